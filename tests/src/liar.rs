//! A chiplet that lies at random, beside one that does not. What a lie may do: fail calls, with its name, and cost its chiplet a
//! reset or a quarantine. What none may do: hang, panic, leak, or have memory reached that is somebody else's.
//!
//! One lie is left out, as nobody could tell: that a purge, or the end of a context, is done and is not.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use shootdown::{
    AddressSpace, Deadlines, Device, DeviceError, Health, Interrupts, InvalidateError, Map,
    MapError, Range, Registers,
};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, GruError, Instruction, Segment};
use shootdown_hw_model::gru::layout::{
    ACTIVE, CAUSE, CCH, EXCEPTION, MANAGEMENT, RESET, STATUS, TFH, TFM, TGH,
};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};

/// The deadlines of all that one call may have to wait for, with room for a loaded machine.
const MOST: Duration = Duration::from_secs(10);

/// What is read of a kind of registers.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Words of fault maps and fault handles, with bits taken out and bits added.
    Fault {
        map: bool,
        word: u64,
        keep: u64,
        add: u64,
    },
    /// Contexts or purges do not end, or end with an exception of this cause.
    NotDone {
        contexts: bool,
        cause: Option<u64>,
    },
    /// Control blocks.
    Block {
        keep: u64,
        add: u64,
    },
    /// So many interrupts have come.
    Storm(u64),
    /// A reset is never over, or is over at once without having begun.
    Reset {
        over: bool,
    },
    Gone,
}

fn lie(bytes: &mut Unstructured<'_>) -> Result<Lie> {
    let keep = match bytes.int_in_range(0..=2_u8)? {
        0 => 0,
        1 => u64::MAX,
        _ => bytes.arbitrary()?,
    };
    let add = match bytes.int_in_range(0..=3_u8)? {
        0 => 0,
        1 => u64::MAX,
        // A miss, as a handle tells it.
        2 => 3 << 24 | 1 << 20,
        _ => bytes.arbitrary()?,
    };
    Ok(match bytes.int_in_range(0..=11_u8)? {
        0..=4 => Lie::Fault {
            map: bytes.arbitrary()?,
            word: bytes.int_in_range(0..=5)?,
            keep,
            add,
        },
        5..=7 => Lie::NotDone {
            contexts: bytes.arbitrary()?,
            cause: match bytes.arbitrary()? {
                true => Some(bytes.int_in_range(0..=15)?),
                false => None,
            },
        },
        8 => Lie::Block { keep, add },
        9 => Lie::Storm(add),
        10 => Lie::Reset {
            over: bytes.arbitrary()?,
        },
        _ => Lie::Gone,
    })
}

struct Liar {
    chiplet: Arc<Chiplet>,
    lies: Mutex<Vec<Lie>>,
}

const GONE: DeviceError = DeviceError::Gone { reason: "a lie" };

impl Liar {
    fn lies(&self) -> Vec<Lie> {
        // One assignment.
        let lies = self.lies.lock().unwrap_or_else(PoisonError::into_inner);
        lies.clone()
    }

    fn tell(&self, lies: Vec<Lie>) {
        *self.lies.lock().unwrap_or_else(PoisonError::into_inner) = lies;
    }
}

impl Registers for Liar {
    fn len(&self) -> u64 {
        self.chiplet.len()
    }

    fn read(&self, offset: u64) -> std::result::Result<u64, DeviceError> {
        let mut value = self.chiplet.read(offset)?;
        let within = offset.checked_sub(MANAGEMENT);
        let handle = |base: u64| {
            let own = within?.checked_sub(base)?;
            (own < 128 * 256).then_some(own % 256 / 8)
        };
        for lie in self.lies() {
            value = match lie {
                Lie::Gone => return Err(GONE),
                Lie::Fault {
                    map,
                    word,
                    keep,
                    add,
                } => match handle(if map { TFM } else { TFH }) {
                    Some(own) if own == word => value & keep | add,
                    _ => value,
                },
                Lie::NotDone { contexts, cause } => {
                    match (handle(if contexts { CCH } else { TGH }), cause) {
                        (Some(0), None) => STATUS.put(value, ACTIVE),
                        (Some(0), Some(cause)) => CAUSE.put(STATUS.put(value, EXCEPTION), cause),
                        _ => value,
                    }
                }
                Lie::Block { keep, add } if within.is_none() => value & keep | add,
                Lie::Reset { over } if within == Some(RESET) => u64::from(!over),
                Lie::Block { .. } | Lie::Reset { .. } | Lie::Storm(_) => value,
            };
        }
        Ok(value)
    }

    fn write(&self, offset: u64, value: u64) -> std::result::Result<(), DeviceError> {
        for lie in self.lies() {
            match lie {
                Lie::Gone => return Err(GONE),
                Lie::Reset { .. } if offset == MANAGEMENT + RESET => return Ok(()),
                _ => {}
            }
        }
        self.chiplet.write(offset, value)
    }
}

impl Interrupts for Liar {
    fn vectors(&self) -> u32 {
        self.chiplet.vectors()
    }

    fn wait(&self, vector: u32, timeout: Duration) -> std::result::Result<u64, DeviceError> {
        let timeout = timeout.min(Duration::from_millis(1));
        let storm = self.lies().into_iter().find_map(|lie| match lie {
            Lie::Storm(count) => Some(count),
            _ => None,
        });
        match storm {
            Some(count) => Ok(count),
            None => self.chiplet.wait(vector, timeout),
        }
    }
}

struct Pair {
    bus: Bus,
    liar: Arc<Liar>,
    gru: Arc<Gru>,
    space: AddressSpace,
    /// The liar's and the honest one's.
    segments: [Option<Segment>; 2],
    buffers: Vec<Range>,
    _model: Model,
}

const PAGES: u64 = 4;

impl Pair {
    fn new() -> Self {
        let bus = Bus::new(1024).expect("frames");
        let model = Model::new(&bus, 2, ChipletConfig::default());
        let chiplets = model.chiplets();
        let liar = |nth: usize| {
            Arc::new(Liar {
                chiplet: chiplets[nth].clone(),
                lies: Mutex::default(),
            })
        };
        // The honest one is a liar who tells no lies.
        let (liar, honest) = (liar(0), liar(1));
        let ports = |name: &str, of: &Arc<Liar>| ChipletPorts {
            name: name.to_owned(),
            blade: 0,
            registers: of.clone(),
            interrupts: of.clone(),
        };
        let config = Config {
            handle_deadline: Duration::from_millis(4),
            load_deadline: Duration::from_millis(20),
            fault_deadline: Duration::from_millis(4),
            ..Config::default()
        };
        let gru = Gru::attach(vec![ports("liar", &liar), ports("honest", &honest)], config);
        let deadlines = Deadlines {
            flush: Duration::from_millis(2),
            full_flush: Duration::from_millis(2),
            reset: Duration::from_millis(4),
            ..Deadlines::default()
        };
        let memory = ModelMemory::new(&bus, 16 << 20).expect("addresses");
        let mut this = Self {
            space: AddressSpace::managed(memory, deadlines),
            segments: [None, None],
            buffers: Vec::new(),
            _model: model,
            liar,
            gru,
            bus,
        };
        this.segments();
        this
    }

    /// A segment on each chiplet, from honest ones.
    fn segments(&mut self) {
        self.segments = [None, None];
        let begun = Instant::now();
        while self.segments.iter().any(Option::is_none) {
            assert!(begun.elapsed() < MOST, "no segment of an honest chiplet");
            // On a loaded machine its own deadlines are short.
            if let Ok(segment) = self.gru.segment(&self.space) {
                let nth = usize::from(segment.chiplet() == "honest");
                self.segments[nth] = Some(segment);
            }
        }
    }

    fn liars(&self) -> &Device {
        &self.gru.devices()[0]
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let kind = bytes.int_in_range(0..=15_u8)?;
        let nth = usize::from(bytes.arbitrary::<u8>()?);
        let buffer = |this: &Self| this.buffers.get(nth % this.buffers.len().max(1)).copied();
        match kind {
            0..=2 => {
                let lies = (0..=nth % 3).map(|_| lie(bytes));
                self.liar.tell(lies.collect::<Result<_>>()?);
            }
            3 => self.liar.tell(Vec::new()),
            4..=6 => {
                if let Ok(mapped) =
                    self.timed("a map", |this| this.space.map(Map::anonymous(PAGES << 12)))
                {
                    self.buffers.push(mapped);
                }
            }
            7 | 8 => {
                let Some(range) = buffer(self) else {
                    return Ok(());
                };
                match self.timed("an unmap", |this| this.space.unmap(range)) {
                    Ok(()) => self.buffers.retain(|one| *one != range),
                    Err(error) => self.allowed(&error),
                }
            }
            9 => {
                let Some(range) = buffer(self) else {
                    return Ok(());
                };
                if let Err(error) = self.timed("a discard", |this| this.space.discard(range)) {
                    self.allowed(&error);
                }
            }
            10..=12 => {
                let Some(range) = buffer(self) else {
                    return Ok(());
                };
                let set = Instruction::vset(range.start(), 7, Element::Double, 512 * PAGES as u32);
                if let Some(segment) = &self.segments[0] {
                    let _ = segment.submit(nth % 4, &set);
                }
            }
            13 => {
                if let Some(segment) = self.segments[0].take() {
                    let _ = self.timed("the end of a segment", |_| segment.unmap());
                    self.timed("the drop of a segment", |_| drop(segment));
                }
                let made = self.timed("a segment", |this| this.gru.segment(&this.space));
                if let Ok(segment) = made {
                    let own = usize::from(segment.chiplet() == "honest");
                    // One that is there already is dropped.
                    self.timed("the drop of a segment", |this| {
                        this.segments[own].get_or_insert(segment);
                    });
                }
            }
            _ => {
                let worked = self.timed("work of the honest one", |this| this.works(1));
                match worked {
                    Ok(()) => {}
                    Err(GruError::Map(error)) => self.allowed(&error),
                    Err(GruError::Fault(_) | GruError::Timeout { .. }) => {}
                    Err(error) => panic!("of the honest one: {error}"),
                }
            }
        }
        Ok(())
    }

    /// A change fails because of the liar only, and that is said.
    fn allowed(&self, error: &MapError) {
        match error {
            MapError::Invalidate(InvalidateError::Quarantined { device, .. }) => {
                assert_eq!(device.name(), "liar", "{error}");
            }
            // What is there already.
            MapError::InQuarantine { .. } => {}
            error => panic!("{error}"),
        }
    }

    fn timed<T>(&mut self, what: &str, call: impl FnOnce(&mut Self) -> T) -> T {
        let begun = Instant::now();
        let result = call(self);
        let lies = self.liar.lies();
        assert!(
            begun.elapsed() < MOST,
            "{what} took {:?}, {lies:?}",
            begun.elapsed()
        );
        result
    }

    /// Work on new memory.
    fn works(&self, nth: usize) -> std::result::Result<(), GruError> {
        let buffer = self.space.map(Map::anonymous(4096))?;
        let set = Instruction::vset(buffer.start(), 0x5ec2, Element::Double, 1);
        let Some(segment) = &self.segments[nth] else {
            return Ok(self.space.unmap(buffer)?);
        };
        let ran = segment.run(7, &set, MOST / 4);
        if ran.is_ok() {
            // SAFETY: mapped just now, and nobody else's.
            let found = unsafe { (buffer.start().get() as *const u64).read_volatile() };
            // What the liar is at work on may have had these addresses before, and goes on where its own space is.
            assert!([0x5ec2, 7].contains(&u64::from_le(found)), "{found:#x}");
        }
        self.space.unmap(buffer)?;
        ran.map(drop)
    }

    /// It tells the truth from here on: everything comes back, and nothing was reached.
    fn end(mut self) {
        self.liar.tell(Vec::new());
        let begun = Instant::now();
        self.segments = [None, None];
        let healthy = |this: &Self| {
            let devices = this.gru.devices();
            devices
                .iter()
                .all(|device| device.health() == Health::Healthy)
        };
        while !healthy(&self) || self.space.quarantined_bytes() > 0 {
            for device in self.gru.devices() {
                let _ = device.recover(MOST / 8);
            }
            let _ = self.space.drain();
            assert!(
                begun.elapsed() < MOST,
                "{:?} does not recover",
                self.liars()
            );
        }
        self.segments();
        for nth in [1, 0] {
            let begun = Instant::now();
            // Deadlines are short, and the machine may be loaded.
            while let Err(error) = self.works(nth) {
                assert!(begun.elapsed() < MOST, "{error}");
                let _ = self.liars().recover(MOST / 8);
                let _ = self.space.drain();
            }
        }
        self.segments = [None, None];
        let stats = self.gru.stats();
        assert_eq!((stats.contexts_in_use, stats.asids_in_use), (0, 0));
        assert_eq!(self.space.registrations(), 0);
        self.space.exit().expect("everybody is honest by now");
        assert_eq!(self.space.quarantined_bytes(), 0);
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
        let Self {
            bus, space, gru, ..
        } = self;
        drop((space, gru));
        let physical = bus.physical();
        assert_eq!(physical.free_frames(), physical.total(), "frames are kept");
    }
}

/// Steps at most: some take as long as their deadlines.
const STEPS: usize = 24;

/// Runs the story that the bytes spell.
///
/// # Panics
/// A lie had an effect that none may have.
pub fn liar(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mut pair = Pair::new();
    for _ in 0..STEPS {
        if bytes.is_empty() || pair.step(&mut bytes).is_err() {
            break;
        }
    }
    pair.end();
}
