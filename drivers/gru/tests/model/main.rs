//! The driver over the model of its hardware, judged by the model's oracle.

mod hostile;
mod segments;
mod stress;
mod support;
