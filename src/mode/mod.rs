//! One entry per mode; no logic of its own.

pub mod cluster;
mod compile;
pub mod doctor;
mod inspect;
mod run;

pub use self::{
    cluster::Cluster,
    compile::Compile,
    inspect::{Refused, Report, inspect},
    run::Run,
};
