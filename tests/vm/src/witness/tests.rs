//! Traces recorded from QEMU 10.0.2, whole and with lines taken out.

use super::*;
use crate::trace::{Item, Splitter};

/// An unmap with a DMA in flight, as recorded.
const FLIGHT: &str = "\
MARK begin x\r
vtd_inv_desc invalidate desc type context-cache high 0x0 low 0x800030031
vtd_inv_desc invalidate desc type wait high 0x11b5204 low 0x200000025
vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b5204 data 0x2
vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x300e2
vtd_inv_desc_iotlb_domain iotlb invalidate whole domain 0x3
vtd_inv_desc invalidate desc type wait high 0x11b520c low 0x200000025
vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b520c data 0x2
FAULTS 0x8 0x30000000 0x1000\r
UNMAP 0x30000000 0x1000\r
vtd_inv_desc invalidate desc type iotlb high 0x30000000 low 0x300f2
vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x3 addr 0x30000000 mask 0x0
vtd_inv_desc invalidate desc type wait high 0x11b523c low 0x200000025
vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b523c data 0x2
UNMAPPED 0x30000000 0x1000\r
vtd_dmar_fault sid 0x8 fault 5 addr 0x30000000 write 1
qemu-system-x86_64: New fault is not recorded due to compression of faults
vtd_dmar_fault sid 0x8 fault 5 addr 0x30000004 write 1
TEST x ok\r
MARK end x\r
";

/// An unmap of a page of a device with an ATS cache; its flush stands for `@ATS@`.
const ATS: &str = "\
MARK begin x\r
ATS 0x100\r
UNMAP 0x10000000 0x1000\r
vtd_inv_desc invalidate desc type iotlb high 0x10000000 low 0x300f2
vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x3 addr 0x10000000 mask 0x0
vtd_inv_desc invalidate desc type wait high 0x11b5e64 low 0x200000025
vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b5e64 data 0x2
@ATS@
UNMAPPED 0x10000000 0x1000\r
MARK end x\r
";

fn judge(text: &str) -> (Witness, Findings) {
    let mut splitter = Splitter::default();
    let mut witness = Witness::default();
    let mut findings = None;
    for line in text.split_terminator('\n') {
        match splitter.line(line) {
            Some(Item::Guest(line)) => findings = witness.guest(&line).or(findings),
            Some(Item::Iommu(event)) => witness.iommu(event),
            Some(Item::Other(_)) | None => {}
        }
    }
    (witness, findings.unwrap_or_default())
}

fn complaints(text: &str) -> Vec<Complaint> {
    judge(text).1.complaints
}

fn without(text: &str, part: &str) -> String {
    let left: String = text
        .split_inclusive('\n')
        .filter(|line| !line.contains(part))
        .collect();
    assert!(left.len() < text.len(), "nothing to take out");
    left
}

const PAGE_3: Iova = Iova {
    start: 0x3000_0000,
    len: 0x1000,
};

#[test]
fn a_recorded_unmap_with_dma_in_flight_is_borne_out() {
    let (witness, findings) = judge(FLIGHT);
    assert_eq!(findings.complaints, []);
    assert_eq!((findings.unmapped, findings.fault_pages), (1, 1));
    assert_eq!(witness.stray(), []);
}

#[test]
fn an_unmap_without_its_invalidation_is_found() {
    let found = complaints(&without(FLIGHT, "addr 0x30000000 mask"));
    assert!(
        matches!(
            found[..],
            [Complaint::NotInvalidated {
                range: Bytes(PAGE_3),
                missing: 0x3000_0000,
                ..
            }]
        ),
        "{found:?}"
    );
}

#[test]
fn an_invalidation_before_the_unmap_does_not_count() {
    let moved = FLIGHT.replace("UNMAP 0x30000000 0x1000\r\n", "");
    let moved = moved.replace("UNMAPPED", "UNMAP 0x30000000 0x1000\r\nUNMAPPED");
    assert!(matches!(
        complaints(&moved)[..],
        [Complaint::NotInvalidated { .. }]
    ));
}

#[test]
fn an_invalidation_that_nobody_waited_for_is_found() {
    let range = Bytes(PAGE_3);
    assert_eq!(
        complaints(&without(FLIGHT, "status write addr 0x11b523c")),
        [Complaint::NotWaited { range }]
    );
}

#[test]
fn a_wait_before_the_invalidation_does_not_count() {
    let wait = "vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b523c data 0x2\n";
    let early = FLIGHT
        .replace(wait, "")
        .replace("UNMAP 0x", &format!("{wait}UNMAP 0x"));
    let early = early.replace(
        "vtd_inv_desc invalidate desc type iotlb high 0x30000000",
        &format!("{wait}vtd_inv_desc invalidate desc type iotlb high 0x30000000"),
    );
    assert_eq!(
        complaints(&early),
        [Complaint::NotWaited {
            range: Bytes(PAGE_3)
        }]
    );
}

#[test]
fn an_invalidation_of_a_part_is_not_enough() {
    let longer = FLIGHT.replace("0x30000000 0x1000\r", "0x30000000 0x2000\r");
    assert!(matches!(
        complaints(&longer)[..],
        [Complaint::NotInvalidated {
            missing: 0x3000_1000,
            ..
        }]
    ));
}

#[test]
fn parts_add_up_within_one_domain_only() {
    let longer = FLIGHT.replace("0x30000000 0x1000\r", "0x30000000 0x2000\r");
    let second = |domain: u16| {
        longer.replace(
            "addr 0x30000000 mask 0x0\n",
            &format!(
                "addr 0x30000000 mask 0x0\nvtd_inv_desc_iotlb_pages iotlb invalidate domain {domain:#x} addr 0x30001000 mask 0x0\n"
            ),
        )
    };
    assert_eq!(complaints(&second(3)), []);
    assert!(matches!(
        complaints(&second(4))[..],
        [Complaint::NotInvalidated { .. }]
    ));
}

#[test]
fn a_range_that_is_mapped_in_two_domains_is_invalidated_in_both() {
    let both = FLIGHT.replace("UNMAP 0x", "DOMAINS 0x2\r\nUNMAP 0x");
    assert!(matches!(
        complaints(&both)[..],
        [Complaint::NotInvalidated {
            invalidated: 1,
            wanted: 2,
            ..
        }]
    ));
    let page = "vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x3 addr 0x30000000 mask 0x0\n";
    let second = page.replace("domain 0x3", "domain 0x4");
    assert_eq!(
        complaints(&both.replace(page, &format!("{page}{second}"))),
        []
    );
    let late = both.replace("UNMAPPED", &format!("{second}UNMAPPED"));
    assert_eq!(
        complaints(&late),
        [Complaint::NotWaited {
            range: Bytes(PAGE_3)
        }]
    );
}

#[test]
fn a_whole_domain_covers_any_range() {
    let whole = FLIGHT.replace(
        "vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x3 addr 0x30000000 mask 0x0",
        "vtd_inv_desc_iotlb_domain iotlb invalidate whole domain 0x3",
    );
    assert_eq!(complaints(&whole), []);
}

#[test]
fn a_fault_that_was_announced_and_did_not_come_is_found() {
    let none = without(FLIGHT, "vtd_dmar_fault");
    let range = Bytes(PAGE_3);
    assert_eq!(
        complaints(&none),
        [Complaint::NoFault {
            requester: Requester(8),
            range
        }]
    );
}

#[test]
fn a_fault_that_nobody_announced_is_found_and_counted_by_page() {
    let count = FaultCount {
        reads: 0,
        writes: 2,
    };
    assert_eq!(
        complaints(&without(FLIGHT, "FAULTS")),
        [Complaint::UnexpectedFault {
            requester: Requester(8),
            page: 0x3000_0000,
            count
        }]
    );
    let elsewhere = FLIGHT.replace("addr 0x30000004", "addr 0x30001004");
    assert!(matches!(
        complaints(&elsewhere)[..],
        [Complaint::UnexpectedFault {
            page: 0x3000_1000,
            ..
        }]
    ));
}

#[test]
fn a_fault_that_is_only_allowed_may_come_or_not() {
    let allowed = FLIGHT.replace("FAULTS", "MAYFAULT");
    assert_eq!(complaints(&allowed), []);
    assert_eq!(complaints(&without(&allowed, "vtd_dmar_fault")), []);
    let elsewhere = allowed.replace("addr 0x30000004", "addr 0x30001004");
    assert!(matches!(
        complaints(&elsewhere)[..],
        [Complaint::UnexpectedFault { .. }]
    ));
}

#[test]
fn a_fault_of_another_device_is_not_the_one_that_was_announced() {
    let other = FLIGHT.replace("sid 0x8", "sid 0x10");
    assert!(matches!(
        complaints(&other)[..],
        [Complaint::NoFault { .. }, Complaint::UnexpectedFault { .. }]
    ));
}

#[test]
fn a_fault_after_the_end_of_a_check_is_not_lost() {
    let late = format!("{FLIGHT}vtd_dmar_fault sid 0x8 fault 5 addr 0x30000008 write 1\n");
    let (witness, findings) = judge(&late);
    assert_eq!(findings.complaints, []);
    assert!(matches!(
        witness.stray(),
        [Complaint::UnexpectedFault { .. }]
    ));
}

#[test]
fn unmap_and_unmapped_come_in_pairs() {
    let range = Bytes(PAGE_3);
    assert_eq!(
        complaints(&without(FLIGHT, "UNMAPPED ")),
        [Complaint::Unpaired { range }]
    );
    assert_eq!(
        complaints(&without(FLIGHT, "UNMAP 0x")),
        [Complaint::Unpaired { range }]
    );
}

#[test]
fn an_ats_cache_must_be_flushed_and_waited_for() {
    const FLUSH: &str =
        "vtd_inv_desc invalidate desc type device high 0x10000000 low 0x10000000003\n";
    const WAIT: &str =
        "vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b5e6c data 0x2\n";
    let with = |text: &str| complaints(&ATS.replace("@ATS@\n", text));
    assert_eq!(with(&format!("{FLUSH}{WAIT}")), []);
    for bad in [
        String::new(),
        WAIT.into(),
        FLUSH.into(),
        format!("{}{WAIT}", FLUSH.replace("0x100000", "0x200000")),
    ] {
        assert!(
            matches!(
                with(&bad)[..],
                [Complaint::DeviceTlbNotFlushed {
                    missing: 0x1000_0000,
                    ..
                }]
            ),
            "{bad}"
        );
    }
}

#[test]
fn marks_that_do_not_nest_are_told() {
    let (witness, _) = judge(&format!("MARK begin y\r\n{FLIGHT}"));
    assert!(matches!(witness.stray(), [Complaint::OutOfPlace(_), ..]));
    let (witness, _) = judge("UNMAPPED 0x1000 0x1000\r\n");
    assert!(matches!(witness.stray(), [Complaint::OutOfPlace(_)]));
}
