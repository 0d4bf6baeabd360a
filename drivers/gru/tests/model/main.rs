//! The driver over the model of its hardware, judged by the model's oracle.

mod flush;
mod hostile;
mod instructions;
mod kernel;
mod misses;
mod oversubscribed;
mod segments;
mod storm;
mod stress;
mod support;
