//! What guest and host say to each other: one line each, on the guest's debug port.
//!
//! The guest announces its checks (`PLAN`), then for each prints `MARK begin`, what it does, `TEST`, `MARK end`. Names of
//! checks hold no spaces. Numbers are hexadecimal with `0x`.

use std::fmt;

/// Sections whose name begins so are negative controls: guest and witness must both fail there.
pub const CONTROL: &str = "control:";

/// A range of I/O virtual addresses; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Iova {
    /// The first address.
    pub start: u64,
    /// The length in bytes, at least 1.
    pub len: u64,
}

impl Iova {
    /// `len` bytes from `start`; `None` if that is empty or leaves the 64-bit space.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        (len > 0 && start.checked_add(len - 1).is_some()).then_some(Self { start, len })
    }

    /// The last address of the range.
    pub fn last(&self) -> u64 {
        self.start + (self.len - 1)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} {:#x}", self.start, self.len)
    }
}

/// A PCI requester: bus, device and function as the IOMMU sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Requester(pub u16);

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The guest will run this check.
    Plan(String),
    /// A check begins.
    Begin(String),
    /// A check is over, its device work included.
    End(String),
    /// The guest is about to have this range unmapped.
    Unmap(Iova),
    /// The guest was told that this range is unmapped.
    Unmapped(Iova),
    /// From here to the end of the check each range is mapped in so many domains of the IOMMU (one, if it is not said).
    Domains(u64),
    /// From here to the end of the check the requester's ATS cache must be flushed with each range.
    Ats(Requester),
    /// In this check DMA of the requester to this range must fault.
    Faults(Requester, Iova),
    /// In this check DMA of the requester to this range may fault, or have landed before.
    MayFault(Requester, Iova),
    /// The check held, as far as the guest can tell.
    Ok(String),
    /// The check failed in the guest, and why.
    Fail(String, String),
    /// Something that was measured: name and text.
    Figure(String, String),
    /// A line that the command under test printed: name of the file that it belongs to, and text.
    Output(String, String),
    /// Something worth reading when a run failed.
    Note(String),
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plan(name) => write!(f, "PLAN {name}"),
            Self::Begin(name) => write!(f, "MARK begin {name}"),
            Self::End(name) => write!(f, "MARK end {name}"),
            Self::Unmap(range) => write!(f, "UNMAP {range}"),
            Self::Unmapped(range) => write!(f, "UNMAPPED {range}"),
            Self::Domains(count) => write!(f, "DOMAINS {count:#x}"),
            Self::Ats(requester) => write!(f, "ATS {requester}"),
            Self::Faults(requester, range) => write!(f, "FAULTS {requester} {range}"),
            Self::MayFault(requester, range) => write!(f, "MAYFAULT {requester} {range}"),
            Self::Ok(name) => write!(f, "TEST {name} ok"),
            Self::Fail(name, why) => write!(f, "TEST {name} FAIL {}", one_line(why)),
            Self::Figure(name, text) => write!(f, "FIGURE {name}: {}", one_line(text)),
            Self::Output(name, text) => write!(f, "OUTPUT {name}: {}", one_line(text)),
            Self::Note(text) => write!(f, "NOTE {}", one_line(text)),
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\r', '\n'], " | ")
}

impl Line {
    /// Reads a line back; `None` if it is not one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let (word, rest) = text.split_once(' ')?;
        match word {
            "PLAN" => Some(Self::Plan(rest.into())),
            "MARK" => match rest.split_once(' ')? {
                ("begin", name) => Some(Self::Begin(name.into())),
                ("end", name) => Some(Self::End(name.into())),
                _ => None,
            },
            "UNMAP" => Some(Self::Unmap(range(rest)?)),
            "UNMAPPED" => Some(Self::Unmapped(range(rest)?)),
            "DOMAINS" => Some(Self::Domains(number(rest)?)),
            "ATS" => Some(Self::Ats(requester(rest)?)),
            "FAULTS" => device(rest).map(|(who, what)| Self::Faults(who, what)),
            "MAYFAULT" => device(rest).map(|(who, what)| Self::MayFault(who, what)),
            "TEST" => {
                let (name, verdict) = rest.split_once(' ')?;
                match verdict.split_once(' ').unwrap_or((verdict, "")) {
                    ("ok", "") => Some(Self::Ok(name.into())),
                    ("FAIL", why) => Some(Self::Fail(name.into(), why.into())),
                    _ => None,
                }
            }
            "FIGURE" => {
                let (name, text) = rest.split_once(": ")?;
                Some(Self::Figure(name.into(), text.into()))
            }
            "OUTPUT" => {
                let (name, text) = rest.split_once(": ")?;
                Some(Self::Output(name.into(), text.into()))
            }
            "NOTE" => Some(Self::Note(rest.into())),
            _ => None,
        }
    }
}

fn range(text: &str) -> Option<Iova> {
    let (start, len) = text.split_once(' ')?;
    Iova::new(number(start)?, number(len)?)
}

fn device(text: &str) -> Option<(Requester, Iova)> {
    let (who, what) = text.split_once(' ')?;
    Some((requester(who)?, range(what)?))
}

fn requester(text: &str) -> Option<Requester> {
    number(text)?.try_into().ok().map(Requester)
}

/// A hexadecimal number with `0x`.
pub(crate) fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read_back_as_it_was_written() {
        let range = Iova::new(0x1000, 0x2000).unwrap();
        let name = || "a-check".to_owned();
        for line in [
            Line::Plan(name()),
            Line::Begin(name()),
            Line::End(name()),
            Line::Unmap(range),
            Line::Unmapped(range),
            Line::Domains(2),
            Line::Ats(Requester(0x100)),
            Line::Faults(Requester(0x20), range),
            Line::MayFault(Requester(0x20), range),
            Line::Ok(name()),
            Line::Fail(name(), "because of this".into()),
            Line::Figure("time of a map".into(), "1.5 us".into()),
            Line::Output("a.txt".into(), "  some: text".into()),
            Line::Output("a.txt".into(), String::new()),
            Line::Note("some text".into()),
        ] {
            assert_eq!(Line::parse(&line.to_string()), Some(line));
        }
    }

    #[test]
    fn a_reason_of_several_lines_becomes_one() {
        let line = Line::Fail("x".into(), "left: 1\nright: 2".into());
        assert_eq!(line.to_string(), "TEST x FAIL left: 1 | right: 2");
    }

    #[test]
    fn what_is_not_ours_or_is_cut_short_is_refused() {
        for text in [
            "",
            "MARK",
            "MARK middle x",
            "UNMAP 0x1000",
            "UNMAP 0x1000 0x0",
            "UNMAP 1000 1000",
            "UNMAP 0xffffffffffffffff 0x2",
            "TEST x okay",
            "FAULTS 0x10000 0x0 0x1",
            "[    1.7] Kernel panic",
        ] {
            assert_eq!(Line::parse(text), None, "{text}");
        }
    }
}
