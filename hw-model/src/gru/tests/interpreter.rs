//! What instructions mean, over two byte arrays, in the simplest words. Shares nothing with the chiplet but the numbers of
//! the data sheet.

use super::rig::Instr;

/// Memory from `base` on, and a data segment.
pub(super) struct Plain {
    pub(super) base: u64,
    pub(super) memory: Vec<u8>,
    pub(super) dsr: Vec<u8>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Plain {
    fn at(&mut self, addr: u64, len: usize) -> &mut [u8] {
        let offset = (addr - self.base) as usize;
        &mut self.memory[offset..offset + len]
    }

    /// Carries out a correct instruction: what its result word holds, if it has one.
    pub(super) fn run(&mut self, i: &Instr) -> Option<u64> {
        let size = if i.element == 6 { 64 } else { 1 << i.element };
        match i.opcode {
            0 | 0xf => None,
            1 => {
                for n in 0..i.count as usize * size {
                    let byte = self.at(i.base0 + n as u64, 1)[0];
                    self.at(i.base1 + n as u64, 1)[0] = byte;
                }
                None
            }
            2..=7 | 0xe => {
                for n in 0..i.count as usize {
                    let index = i.tri1 as usize + 8 * n;
                    let step = match i.opcode {
                        3 | 5 | 7 => number(&self.dsr[index..index + 8]) as i64,
                        _ => n as i64 * i.stride,
                    };
                    let addr = (i.base0 as i64 + step * size as i64) as u64;
                    let own = i.tri0 as usize + n * size;
                    match i.opcode {
                        2 | 3 => {
                            let bytes = self.at(addr, size).to_vec();
                            self.dsr[own..own + size].copy_from_slice(&bytes);
                        }
                        6 | 7 => {
                            let value = i.base1.to_le_bytes().repeat(8);
                            self.at(addr, size).copy_from_slice(&value[..size]);
                        }
                        _ => {
                            let bytes = self.dsr[own..own + size].to_vec();
                            self.at(addr, size).copy_from_slice(&bytes);
                        }
                    }
                }
                None
            }
            _ => {
                let old = number(self.at(i.base0, size));
                let cut = |value: u64| value & (u64::MAX >> (64 - 8 * size));
                let (one, two) = (cut(i.operand1), cut(i.operand2));
                let own = i.tri0 as usize;
                let mask = number(&self.dsr[own..own + size]);
                let new = match (i.opcode, i.extended) {
                    (0xa, 2) => 0,
                    (0xa, 5) => old.wrapping_add(1),
                    (0xa, 7) => old.wrapping_sub(1),
                    (0xb, 0xf) if old > 0 => old - 1,
                    (0xc, 0) => one,
                    (0xc, 1) => old | one,
                    (0xc, 2) => old & one,
                    (0xc, 3) => old ^ one,
                    (0xc, 4) => old.wrapping_add(one),
                    (0xc, 8) if old == two => one,
                    (0xc, 0xc) if old != two => old.wrapping_add(one),
                    (9, 0xb) if old & mask == two & mask => (old & !mask) | (one & mask),
                    _ => old,
                };
                self.at(i.base0, size)
                    .copy_from_slice(&new.to_le_bytes()[..size]);
                Some(old)
            }
        }
    }
}
