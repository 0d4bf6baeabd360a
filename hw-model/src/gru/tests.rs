//! Tests of a chiplet through its registers.

mod contexts;
mod faults;
mod injected;
mod instructions;
mod interpreter;
mod purges;
mod rig;
mod throughput;
