//! One entry per mode; no logic of its own.

mod compile;
mod inspect;
mod run;

pub use self::{
    compile::{CompileFlags, compile_into, compile_to},
    inspect::{Refused, Report, inspect},
    run::Run,
};
