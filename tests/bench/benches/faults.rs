//! What a storm of faults costs: `cargo bench -p shootdown-bench --bench faults`, or some rows of it, by words: `-- gru`.
//!
//! Both kinds of device of the models, whose faults their own drivers resolve, on a thread of their own. A thousand pages are touched
//! at once, as far as the device can, against a thousand touched one after the other: each of those is a fault by itself, with its
//! interrupt and its begin. Then the same thousand by one command, with and without the pages round or behind a fault. What was
//! installed is shot down between the rounds, outside of what is timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{Addr, AddressSpace, Deadlines, Map, Range};
use shootdown_bench::case::Case;
use shootdown_bench::round::compare;
use shootdown_gru::{ChipletPorts, Element, Gru, Instruction, Segment, SegmentOptions};
use shootdown_hw_model::{Bus, ModelMemory, gru, pta};
use shootdown_pta::{Command, Pta, Queue};

const PAGES: u64 = 1000;
const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(10);

fn space(bus: &Bus) -> AddressSpace {
    let memory = ModelMemory::new(bus, 64 << 20).expect("memory");
    AddressSpace::managed(memory, Deadlines::default())
}

fn map(space: &AddressSpace, pages: u64) -> Range {
    let map = Map::anonymous(pages * PAGE);
    space.map(map).expect("a mapping")
}

fn page(of: Range, nth: u64) -> Addr {
    Addr::new(of.start().get() + nth * PAGE)
}

/// Times `once`, after each of which all of `range` is shot down.
fn shot_down(
    name: &str,
    space: AddressSpace,
    range: Range,
    mut once: impl FnMut() + 'static,
) -> Case {
    Case::timed(name, move |times| {
        let mut took = Duration::ZERO;
        for _ in 0..times {
            let begun = Instant::now();
            once();
            took += begun.elapsed();
            space.discard(range).expect("a discard");
        }
        took
    })
}

/// A chiplet, and a segment of a space with all of its control blocks.
struct OnGru {
    space: AddressSpace,
    segment: Segment,
    buffer: Range,
    _model: gru::Model,
}

impl OnGru {
    const BLOCKS: u64 = 125;

    fn new(preload: u8) -> Self {
        let bus = Bus::new(8 << 10).expect("frames");
        let hardware = gru::ChipletConfig {
            tlb_entries: 2 * PAGES as usize,
            ..gru::ChipletConfig::default()
        };
        let model = gru::Model::new(&bus, 1, hardware);
        let chiplet = model.chiplets()[0].clone();
        let ports = ChipletPorts {
            name: "gru0".into(),
            blade: 0,
            registers: chiplet.clone(),
            interrupts: chiplet,
        };
        let config = shootdown_gru::Config::default();
        let options = SegmentOptions {
            control_blocks: 128,
            preload,
            ..config.segment
        };
        let driver = Gru::attach(vec![ports], config);
        let space = space(&bus);
        Self {
            segment: driver.segment_with(&space, options).expect("a segment"),
            buffer: map(&space, PAGES),
            space,
            _model: model,
        }
    }

    fn case(self, name: &str, mut once: impl FnMut(&Segment, Range) + 'static) -> Case {
        let (space, buffer) = (self.space.clone(), self.buffer);
        shot_down(name, space, buffer, move || {
            once(&self.segment, self.buffer)
        })
    }

    fn touch(segment: &Segment, block: u64, at: Addr) {
        let set = Instruction::vset(at, 1, Element::Double, 1);
        segment.submit(block as usize, &set).expect("a start");
    }

    fn wait(segment: &Segment, block: u64) {
        segment.wait(block as usize, LONG).expect("its end");
    }

    fn storm() -> Case {
        Self::new(0).case("gru: at once", |segment, buffer| {
            for round in 0..PAGES / Self::BLOCKS {
                for block in 0..Self::BLOCKS {
                    let at = page(buffer, round * Self::BLOCKS + block);
                    Self::touch(segment, block, at);
                }
                (0..Self::BLOCKS).for_each(|block| Self::wait(segment, block));
            }
        })
    }

    fn singles() -> Case {
        Self::new(0).case("gru: one by one", |segment, buffer| {
            for nth in 0..PAGES {
                Self::touch(segment, 0, page(buffer, nth));
                Self::wait(segment, 0);
            }
        })
    }

    /// Half of the pages are copied to the other half.
    fn copy(preload: u8) -> Case {
        Self::new(preload).case("gru: a copy", |segment, buffer| {
            let words = PAGES / 2 * PAGE / 8;
            let to = page(buffer, PAGES / 2);
            let copy = Instruction::bcopy(buffer.start(), to, 0, Element::Double, words as u32);
            segment.run(0, &copy, LONG).expect("a copy");
        })
    }
}

/// A page-table accelerator, and as many queues of a space as a thousand commands take.
struct OnPta {
    space: AddressSpace,
    queues: Vec<Queue>,
    buffer: Range,
    _model: Arc<pta::Pta>,
}

impl OnPta {
    fn new(config: shootdown_pta::Config) -> Self {
        let bus = Bus::new(8 << 10).expect("frames");
        let hardware = pta::PtaConfig {
            requests: pta::layout::REQUESTS,
            tlb_entries: PAGES as usize,
            ..pta::PtaConfig::default()
        };
        let model = pta::Pta::new(&bus, hardware).expect("a device");
        let driver = Pta::probe("pta0", model.clone(), model.clone(), config).expect("a driver");
        let space = space(&bus);
        let queue = |_| driver.queue(&space).expect("a queue");
        Self {
            queues: (0..PAGES.div_ceil(16)).map(queue).collect(),
            buffer: map(&space, PAGES),
            space,
            _model: model,
        }
    }

    fn case(self, name: &str, mut once: impl FnMut(&[Queue], Range) + 'static) -> Case {
        let (space, buffer) = (self.space.clone(), self.buffer);
        shot_down(name, space, buffer, move || once(&self.queues, self.buffer))
    }

    fn touch(at: Addr, pages: u64) -> Command {
        Command::Touch {
            range: Range::new(at, pages * PAGE).expect("pages"),
            write: true,
        }
    }

    fn storm(config: shootdown_pta::Config) -> Case {
        Self::new(config).case("pta: at once", |queues, buffer| {
            let slot = |nth: u64| (&queues[nth as usize / 16], nth as usize % 16);
            for nth in 0..PAGES {
                let (queue, slot) = slot(nth);
                let touch = Self::touch(page(buffer, nth), 1);
                queue.submit(slot, &touch).expect("a start");
            }
            for nth in 0..PAGES {
                let (queue, slot) = slot(nth);
                queue.wait(slot, LONG).expect("its end");
            }
        })
    }

    fn singles() -> Case {
        Self::new(one_by_one()).case("pta: one by one", |queues, buffer| {
            for nth in 0..PAGES {
                let touch = Self::touch(page(buffer, nth), 1);
                queues[0].run(0, &touch, LONG).expect("a touch");
            }
        })
    }

    fn command(config: shootdown_pta::Config) -> Case {
        Self::new(config).case("pta: a command", |queues, buffer| {
            let touch = Self::touch(buffer.start(), PAGES);
            queues[0].run(0, &touch, LONG).expect("a touch");
        })
    }
}

/// Each request by itself, and nothing but what was asked for.
fn one_by_one() -> shootdown_pta::Config {
    shootdown_pta::Config {
        fault_batch: 1,
        fault_around: 1,
        ..shootdown_pta::Config::default()
    }
}

/// In batches, and nothing but what was asked for.
fn in_batches() -> shootdown_pta::Config {
    shootdown_pta::Config {
        fault_around: 1,
        ..shootdown_pta::Config::default()
    }
}

type Make = fn() -> Case;

/// What is measured, against what.
const ROWS: [(&str, Make, &str, Make); 6] = [
    (
        "gru: 1000 pages at once, a page",
        OnGru::storm,
        "one by one",
        OnGru::singles,
    ),
    (
        "gru: a copy of 500 pages to 500, a page",
        || OnGru::copy(8),
        "without preloads",
        || OnGru::copy(0),
    ),
    (
        "pta: 1000 pages at once, a page",
        || OnPta::storm(shootdown_pta::Config::default()),
        "one by one",
        OnPta::singles,
    ),
    (
        "pta: 1000 pages at once, a page, nothing round it",
        || OnPta::storm(in_batches()),
        "one by one",
        OnPta::singles,
    ),
    (
        "pta: 1000 pages at once, a page, nothing round it",
        || OnPta::storm(in_batches()),
        "at once, each request by itself",
        || OnPta::storm(one_by_one()),
    ),
    (
        "pta: a command over 1000 pages, a page",
        || OnPta::command(shootdown_pta::Config::default()),
        "nothing round it",
        || OnPta::command(one_by_one()),
    ),
];

fn main() {
    // Cargo says `--bench` to every benchmark.
    let words = std::env::args().skip(1);
    let words: Vec<_> = words.filter(|word| !word.starts_with("--")).collect();
    println!("| what | ns | baseline | ns | ratio |\n|---|---|---|---|---|");
    for (name, subject, other, baseline) in ROWS {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        let found = compare(&mut subject(), &mut baseline());
        let each = |nanoseconds: f64| nanoseconds / PAGES as f64;
        println!(
            "| {name} | {:.0} | {other} | {:.0} | {:.2} |",
            each(found.subject),
            each(found.baseline),
            found.ratio
        );
    }
}
