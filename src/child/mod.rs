//! What a child process does: the other end of [`process`](crate::process), with the sandbox in it.

mod compiler;
mod http;
mod output;
mod pulse;
mod worker;

use crate::process::{Role, child};

pub(crate) use self::{
    compiler::{compile_aside, find_compiled, inspect_aside},
    http::ListenConfig,
    worker::WorkerConfig,
};

/// If this process was started as a child of another one (a worker, a compiler), becomes that and never returns.
///
/// A program that uses [`Cluster`](crate::Cluster) calls this first thing in `main`, before it starts threads or
/// looks at its arguments: the pool's workers are this program, started again.
///
/// ```
/// wrun::init();
/// // the program
/// ```
#[expect(clippy::exit, reason = "a child has no main to return to")]
pub fn init() {
    if !child::is_child() {
        crate::process::initialised();
        return;
    }
    let code = match child::start() {
        Ok(start) => match start.hello.role {
            Role::Worker => worker::main(start),
            Role::Compiler => compiler::main(start),
        },
        // nobody listens: whoever started this is gone, or is no primary
        Err(_) => 125,
    };
    std::process::exit(code);
}
