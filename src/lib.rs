//! Node's parallelism model for WebAssembly, with every worker a sandbox.
//!
//! wrun loads guests, untrusted WebAssembly programs, and runs them as isolated *workers*: in this process, or as
//! supervised processes in a pool. Messages between host and guests are JSON texts; the interfaces they cross are in
//! `wit/`, the contract, which is all that host and guests share. The `wrun` command is a thin face over this library.
//!
//! | to | use |
//! | --- | --- |
//! | run one command guest in the foreground | [`Run`] |
//! | start one in a process of its own, with streams | [`Command`], [`exec`] |
//! | start one with a mailbox | [`fork`], [`Command::fork`] |
//! | keep a pool of handler guests, and give it tasks | [`Cluster`] |
//! | serve a port with a pool of http guests or handlers | [`Cluster`], [`listen`](cluster::Builder::listen) |
//! | feed JSON lines to a pool | [`cluster::lines`] |
//! | serve the guests in a folder, as they come and go | [`watch`] |
//! | run the jobs of a file, with a verdict and reports | [`ci`] |
//! | run threads of one guest on one memory, in this process | [`Threads`] |
//! | the same in a process of their own | [`Command::workers`] |
//! | hand the chunks of a [`Buffer`] to a guest on all cores | [`par_map`](threads::Builder::par_map), [`Command::par_map`] |
//! | let process workers see a [`Buffer`] without a copy | [`Fork::send_buffer`](command::Fork::send_buffer), [`Command::buffer`], [`cluster::Builder::buffer`] |
//! | say what a guest is | [`inspect`] |
//! | compile ahead | [`Compile`] |
//! | see what stands between guests and this system | [`doctor`] |
//!
//! # The map
//!
//! ```text
//!   main, cli, report                the command: parse, run one mode, print, exit
//!        │
//!   mode/                            one file or folder per mode; no mode knows another
//!     command/{run; launch, child, fork, map, blocking, foreground}  compile  inspect  doctor
//!     cluster/{builder; dispatch, pool, lines; server, serve}  threads/{builder, map}
//!     watch/{folder, settle, settings, version, app, router, run}    (which is made of clusters)
//!     ci/{file, plan, select, graph, schedule; guests, stage, attempt, verdict, capture, mask; run, event, record, report/}    (of commands)
//!        │                    │
//!        │        supervisor/{slot, restart, worker}     slots of workers: start, watch, drain, replace
//!        │                    │
//!        │        process/{wire, page, port, channel, names, child, jail, filter, pidfd, keeper}    one child process: its frames,
//!        │                    │                                                                    its walls, its end
//!        │                    ┊  (a socket pair)
//!        │        child/{worker, http/, command, group, map, mailbox, compiler, trial, pulse, output}    what such a process
//!        │                    │                                                                  does
//!        │                    │
//!   sandbox/{guest, inspect, precheck, instances, code, cache, engine,          the engine, and nothing else
//!        │   host/, instance, window, map, stdio, threads/}                     knows it
//!        │
//!   message  outcome  event  grant  limits  settings  signal  lines  error  buffer/    plain data, used by all
//! ```
//!
//! A task's way through a pool: a [`cluster`] client hands a [`Message`](message::Message), checked where it entered,
//! to the dispatcher, which picks a worker; the supervisor's process sends it as a frame; the child hands it to an
//! instance, whose answer comes back as a frame, is checked where it leaves the sandbox, and completes the client's
//! ticket.
//!
//! A request's way: the primary takes the port and hands its listener to every worker. A worker accepts when it holds no
//! more than its share of the connections, looks at the bytes before it believes them (`child/http/framing`), and polls
//! the guest in the connection's own task, so that a client that leaves takes its guest with it. The primary sees no
//! request; it hears how guests ended, and sees to it that there are workers.
//!
//! A request's way in a folder: a child that runs no guest, the router (`child/http/router`), has the port. It finds the
//! app, makes a pair of sockets, and sends one end through the channel (`process/channel`) at whose other end the workers of
//! the version that is live wait, as they would at a listener. The primary looks at the folder, decides what is to be live
//! (`mode/watch/app`), keeps a pool for each version, and tells the router; the router tells when an old one is idle.
//!
//! A job's way: the file is read into a plan (`mode/ci/plan`), of which some jobs are selected; the schedule says which may
//! start. An attempt copies what the job gets into a folder of its own (`stage`), starts its guest as a command's child, and
//! takes what it prints through masks into a log (`capture`). What it leaves is looked at before it is kept. All that is known
//! of a run is its record, `run.json`, and reports are made of that and the logs.
//!
//! A guest's way: its bytes go to a compiler, a child with bounds of its own ([`limits::CompileLimits`]), and come back
//! as code, which the primary keeps and never looks into. A worker maps the code, closes the jail behind itself
//! (`process/jail`), and only then links and starts the guest.
//!
//! A message's way to a child with a mailbox: [`Fork::send`] puts it into a buffer that is bounded, a task gives that to
//! the socket, and the child reads the socket when its guest asks for a message, and not before. So a slow guest fills
//! first the socket and then the buffer, and its parent is told. The same holds the other way.
//!
//! A group of threads: the guest's own C library makes the threads, by a call of the host (`sandbox/threads`), each with a
//! store and an instance over the one memory. A worker's thread comes to the host to be handed messages. The first thread
//! that ends otherwise than it should ends all. In a process of their own that is the end of the process; in this one each
//! thread is brought to a check, wherever it computes, waits or sleeps.
//!
//! A buffer's way: it is a file without a name, sealed, and so a descriptor is all of it that travels: to a child with its
//! hello, or in the midst of its messages. A guest hands over a region of its own memory (`sandbox/window`), over which the
//! buffer's pages are mapped, until the guest or the end of its instance undoes it. Chunks of one buffer go to a pool of
//! threads (`sandbox/map`), each with an instance, in this process or in a child; their replies come back in order.
//!
//! A connection's way out: the instance asks the worker's network (`sandbox/host/network`), which decides by the grants and
//! the address, and connects to that very address. Names are looked up by the primary (`process/names`), which checks them
//! again. What is refused comes back as an [`event`] that names the missing [`grant`].
//!
//! # Invariants
//!
//! - Two walls stand between a guest and the host: the engine, and what the system lets the guest's process do. Only
//!   [`Run`] can do with the first alone ([`Isolation::Thread`]).
//! - A guest is compiled in no process that has anything else to do.
//! - Guest code runs in [`sandbox`](self) only, and no type of the engine leaves that folder. The primary of a pool
//!   runs no guest code and parses no guest: children do.
//! - A guest that fails is an [`Outcome`](outcome::Outcome), never an [`Error`].
//! - After a trap, a limit or an exit an instance is dropped and never reused.
//! - What a guest sees of a buffer does not change, whoever else has it; what guests write, each writes to a range that
//!   nobody else has. A window is gone before the engine gets the memory back that it lies in.
//! - Threads that share a memory end together, and nothing of it is used again.
//! - Every queue is bounded and says what happens when it is full: the input waits, a guest's `send` answers `full`,
//!   a guest's output is dropped and counted.
//! - Every task that was read is answered once; one that is begun twice says so.
//! - A request is lost only with the worker that had it. Who takes over a slot accepts before its predecessor stops.
//! - Workers do not outlive their primary, whatever ends it.
//! - The router begins no request on a version after the one that took over is told of, and no version ends with a request
//!   that it has, unless its time is over.
//! - A job sees copies of its inputs only, and of what it leaves only plain files are kept. Every job that is selected has one
//!   end in the record, whatever ends the run.
//! - What decides is pure (`dispatch`, `slot`, `restart`, `settle`, `app`, `graph`, `schedule`, `wire`, `framing`, `grant`): the clock is handed
//!   in, and what to do comes out.
//! - Modes tell what happens as [`event`]s and do not print; `report` in the command is the only code that does.
//! - `unsafe` is in `sandbox/code.rs` (mapping machine code), `sandbox/window.rs` and `buffer/memory.rs` (mapping buffers),
//!   `process/page.rs` (shared counters), `process/child.rs` (the inherited socket and descriptors), `process/pidfd.rs`
//!   (waiting for a process), `child/http/accept.rs` (the inherited listener) and `child/trial.rs` (system calls that no guest
//!   should be able to make).

#[cfg(not(target_os = "linux"))]
compile_error!("wrun runs on Linux only: its workers are made of memfds, pidfds and seals");

mod buffer;
mod child;
mod error;
pub mod event;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzz;
pub mod grant;
pub mod limits;
mod lines;
pub mod message;
mod mode;
pub mod outcome;
mod process;
mod sandbox;
mod settings;
mod signal;
mod supervisor;

pub use buffer::{Buffer, BufferMut, Chunk, Chunks, Failed, Mapped, ParMap};
pub use child::init;
pub use error::{Error, ExitCode};
pub use mode::*;
pub use process::Isolation;
pub use sandbox::{Cache, Form, Guest, Inspection, LoadError, Shape, Source};
pub use settings::Flaw;
pub use signal::Signal;
pub use supervisor::Restart;
