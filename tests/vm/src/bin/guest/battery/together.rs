//! One range, two worlds: a GRU of the model and a device behind VFIO hold the same memory. And the edu driver, over VFIO.

use std::sync::Arc;

use shootdown::{Map, Range};
use shootdown_edu::{CheckError, CheckPorts, EduConfig, self_check};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, GruError, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};
use shootdown_vfio::{Kind, Reuse};
use shootdown_vm::protocol::Line;

use super::between::{Between, Telling};
use super::rig::{BEFORE, DMA, Rig, SECOND, SIZE, page, race, unmapping};
use crate::check::{Check, Failure, Outcome, demand, demand_eq};
use crate::memory::PAGE;
use crate::port::say;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "edu:the-drivers-self-check-over-vfio",
        run: edu,
    },
    Check {
        name: "two-worlds:one-unmap-one-start-both-devices-flushed",
        run: two_worlds,
    },
];

/// In this one guest and witness must both fail.
pub(crate) const CONTROL: &[Check] = &[Check {
    name: "control:edus-self-check-over-an-iommu-that-lies",
    run: edu_control,
}];

fn edu() -> Outcome {
    let mut telling = None;
    let rig = Rig::with(Reuse::Late, |container| {
        telling.insert(Telling::new(container)).clone()
    })?;
    let telling = telling.expect("the rig has asked for it");
    race(|| edu_check(&rig))?;
    // The scratch page of the rig is there still: what was unmapped is what the driver had armed DMA to.
    for range in telling.unmapped() {
        rig.say_faults(range);
    }
    Ok(())
}

fn edu_control() -> Outcome {
    let mut between = None;
    let rig = Rig::with(Reuse::Late, |container| {
        Telling::new(between.insert(Between::new(container)).clone())
    })?;
    let between = between.expect("the rig has asked for it");
    between.lie(true);
    let checked = race(|| edu_check(&rig));
    between.lie(false);
    checked
}

/// `None`: the shootdown took longer than the device waits, which proves nothing.
fn edu_check(rig: &Rig) -> Result<Option<()>, Failure> {
    let report = self_check(&CheckPorts {
        registers: Arc::new(rig.device.region(0)?),
        interrupts: Arc::new(rig.device.interrupts(Kind::Msi, 1)?),
        iommu: &rig.iommu,
        space: &rig.space,
        last: (1 << 40) - 1,
        config: EduConfig::default(),
    });
    for step in &report.steps {
        let name = step.check.name();
        match &step.result {
            Ok(()) => say(&Line::Note(format!("edu: {name}: {:?}", step.took))),
            Err(CheckError::TooLate { .. }) => return Ok(None),
            Err(error) => return Err(Failure::NotSo(format!("{name}: {error}"))),
        }
    }
    demand!(report.passed(), "no step was made");
    Ok(Some(()))
}

fn two_worlds() -> Outcome {
    let bus = Bus::new(16 << 10)?;
    let model = Model::new(&bus, 1, ChipletConfig::default());
    let chiplet = &model.chiplets()[0];
    let ports = ChipletPorts {
        name: "gru0".into(),
        registers: chiplet.clone(),
        interrupts: chiplet.clone(),
    };
    let gru = Gru::attach(vec![ports], Config::default());
    let rig = Rig::over(
        ModelMemory::new(&bus, 64 << 20)?,
        Reuse::Late,
        |container| container,
    )?;
    let segment = gru.segment(&rig.space)?;
    race(|| {
        let memory = rig.pages(4)?;
        let window = rig.window(memory, SIZE)?;
        let both = page(memory, 2);
        let set = |part: Range| {
            let fill = Instruction::vset(
                part.start(),
                u64::from_ne_bytes([0x3c; 8]),
                Element::Double,
                512,
            );
            segment.run(0, &fill, SECOND)
        };
        set(both)?;
        demand_eq!(
            rig.view(both).differs(0, PAGE, 0x3c),
            None,
            "what the GRU wrote"
        );
        demand_eq!(chiplet.tlb_entries().len(), 1, "entries in the GRU's TLB");
        rig.load(DMA)?;
        let at = rig.arm(&window, both)?;
        let before = rig.space.stats();
        unmapping(&[at], || rig.space.unmap(both))?;
        if !rig.edu.busy()? {
            return Ok(None);
        }
        let after = rig.space.stats();
        demand_eq!(after.invalidations - before.invalidations, 1, "starts");
        demand_eq!(after.hits - before.hits, 2, "handlers called");
        demand_eq!(
            chiplet.tlb_entries().len(),
            0,
            "entries in the GRU's TLB after it"
        );
        rig.say_faults(at);
        rig.edu.finish()?;
        let refused = set(both);
        demand!(
            matches!(refused, Err(GruError::Exception { .. })),
            "the GRU on unmapped memory: {refused:?}"
        );
        // Whoever gets the frame next keeps what is written there.
        let next = rig.space.map(Map::anonymous(SIZE))?;
        demand_eq!(
            rig.view(next).differs(0, PAGE, 0),
            None,
            "the frame's next owner"
        );
        for other in [0, 1, 3] {
            demand_eq!(
                rig.view(page(memory, other)).differs(0, PAGE, BEFORE),
                None,
                "memory beside it"
            );
        }
        demand_eq!(
            bus.oracle().stale_accesses(),
            0,
            "stale accesses of the GRU"
        );
        Ok(Some(()))
    })
}
