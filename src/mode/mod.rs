//! One entry per mode; no logic of its own.

pub mod ci;
pub mod cluster;
pub mod command;
mod compile;
pub mod doctor;
mod inspect;
pub mod threads;
pub mod watch;

pub use self::{
    cluster::Cluster,
    command::{Child, Command, Fork, Output, Run, exec, fork},
    compile::Compile,
    inspect::{Refused, Report, inspect},
    threads::Threads,
};
