//! wrun

mod error;
pub mod event;
pub mod grant;
pub mod limits;
pub mod message;
mod mode;
pub mod outcome;
mod sandbox;

pub use error::{Error, ExitCode};
pub use mode::*;
pub use sandbox::{Cache, Form, Guest, Inspection, LoadError, Shape, Source};
