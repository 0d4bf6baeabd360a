//! Tests of a chiplet through its registers.

mod contexts;
mod exceptions;
mod faults;
mod injected;
mod instructions;
mod interpreter;
mod messages;
mod purges;
mod rig;
mod throughput;
