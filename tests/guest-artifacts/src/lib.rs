//! The guests that tests, benches and the README use: building this crate compiles `guests/`, and its constants are
//! the paths of what came out.
//!
//! Handlers, commands and HTTP guests are components; a name that ends in `_P1` is the same command as a module.

use std::path::Path;

/// Command: sends back what it receives, or does what a message tells it to; its source lists what it knows.
pub const COURIER: &str = env!("COURIER");

/// Handler: traps while it is instantiated.
pub const CRASH_AT_START: &str = env!("CRASH_AT_START");

/// Handler: `{"data":[1,2,3]}` gives `{"result":[2,4,6],"count":3}`.
pub const DATA_PROCESSOR: &str = env!("DATA_PROCESSOR");

/// Handler: gives every message back as it is written.
pub const ECHO: &str = env!("ECHO");

/// Handler: `10` gives `{"n":10,"fib":55}`, with no hurry.
pub const FIB: &str = env!("FIB");

/// Handler: does what `{"do":…}` tells it to; its source lists what it knows.
pub const HOSTILE: &str = env!("HOSTILE");

/// Handler: tells its identity, its data and how many tasks its instance has handled.
pub const WHOAMI: &str = env!("WHOAMI");

/// Command: prints its arguments and its environment as one line of JSON.
pub const ARGS: &str = env!("ARGS");

/// [`ARGS`] as a module.
pub const ARGS_P1: &str = env!("ARGS_P1");

/// Command: copies its files, or else its stdin, to stdout.
pub const CAT: &str = env!("CAT");

/// [`CAT`] as a module.
pub const CAT_P1: &str = env!("CAT_P1");

/// Command: prints `Hello, world!`.
pub const HELLO: &str = env!("HELLO");

/// [`HELLO`] as a module.
pub const HELLO_P1: &str = env!("HELLO_P1");

/// Command: does what its first argument tells it to; its usage lists what it knows.
pub const HOSTILE_COMMAND: &str = env!("HOSTILE_COMMAND");

/// [`HOSTILE_COMMAND`] as a module.
pub const HOSTILE_COMMAND_P1: &str = env!("HOSTILE_COMMAND_P1");

/// Command: does with the network what its arguments tell it to; its usage lists what it knows.
pub const NET: &str = env!("NET");

/// [`NET`] as a module, which has no network.
pub const NET_P1: &str = env!("NET_P1");

/// Command: fetches the URLs that are its arguments; its source lists its flags.
pub const FETCH: &str = env!("FETCH");

/// HTTP guest: `/?url=URL` answers what is fetched from there, or 502 and the code of the error.
pub const GATEWAY: &str = env!("GATEWAY");

/// HTTP guest: fails in the way that the path says; its source lists what it knows.
pub const CRASH: &str = env!("CRASH");

/// HTTP guest: `{"pid":4711,"worker":1,"generation":1}`, whatever is asked.
pub const HELLO_HTTP: &str = env!("HELLO_HTTP");

/// HTTP guest: `/?ms=N` answers `{"slept":N}` after so long, and `/late?ms=N` ends its body after so long.
pub const SLOW: &str = env!("SLOW");

/// HTTP guest: `/?ms=N` answers `{"spun":N}` after so much computation, `/` and `/late` never end.
pub const SPIN: &str = env!("SPIN");

/// HTTP guest: `/?chunks=N&bytes=B&ms=M` sends chunks, and `POST /echo` gives body and trailers back as they come.
pub const STREAM: &str = env!("STREAM");

/// HTTP guest: tells what it is sent; its source lists the shapes.
pub const UPLOAD: &str = env!("UPLOAD");

/// HTTP guest that others wrote: the example `http_server` of the crate `wstd`, as it was published. It exports
/// `wasi:cli/run` as well, prints `serving PATH` to stdout, and takes any method:
///
/// - `/` answers `Hello, wasi:http/proxy world!` and a line's end.
/// - `/wait-response` and `/wait-body` answer `slept for N millis` after a second, `/stream-body` five lines in half a
///   second.
/// - `/echo`, `/echo-headers` and `/echo-trailers` give back that part of the request, and no other;
///   `/echo-trailers` reads the body first.
/// - `/response-status` answers the status that the header `x-response-status` says, or 500.
/// - `/response-fail` answers an error instead of a response, and `/response-body-fail` breaks its body off.
/// - All else, and whatever has a query, is 404.
pub const FOREIGN_HTTP: &str = env!("FOREIGN_HTTP");

/// Handler: `{"values":N}` gives how often each of 16 values comes up.
pub const HISTOGRAM: &str = env!("HISTOGRAM");

/// [`HISTOGRAM`] with threads.
pub const HISTOGRAM_THREADS: &str = env!("HISTOGRAM_THREADS");

/// Handler: one of its workers does what `{"worker":N,"do":…}` tells it to; its source lists what it knows.
pub const HOSTILE_WORKERS: &str = env!("HOSTILE_WORKERS");

/// [`HOSTILE_WORKERS`] with threads.
pub const HOSTILE_WORKERS_THREADS: &str = env!("HOSTILE_WORKERS_THREADS");

/// Handler: computes for benches, and replies with the time that it took.
pub const KERNELS: &str = env!("KERNELS");

/// [`KERNELS`] with threads.
pub const KERNELS_THREADS: &str = env!("KERNELS_THREADS");

/// Handler: draws the Mandelbrot set, `{"width":W,"height":H,"file":F}`.
pub const MANDELBROT: &str = env!("MANDELBROT");

/// [`MANDELBROT`] with threads.
pub const MANDELBROT_THREADS: &str = env!("MANDELBROT_THREADS");

/// Handler: two workers wake each other in turn, `{"rounds":N}`; alone it fails its tasks.
pub const PINGPONG: &str = env!("PINGPONG");

/// [`PINGPONG`] with threads.
pub const PINGPONG_THREADS: &str = env!("PINGPONG_THREADS");

/// Handler: adds up the numbers of `{"start":A,"end":B}`.
pub const SUM: &str = env!("SUM");

/// [`SUM`] with threads.
pub const SUM_THREADS: &str = env!("SUM_THREADS");

/// [`COURIER`] with threads.
pub const COURIER_THREADS: &str = env!("COURIER_THREADS");

/// [`DATA_PROCESSOR`] with threads.
pub const DATA_PROCESSOR_THREADS: &str = env!("DATA_PROCESSOR_THREADS");

/// [`ECHO`] with threads.
pub const ECHO_THREADS: &str = env!("ECHO_THREADS");

/// [`FIB`] with threads.
pub const FIB_THREADS: &str = env!("FIB_THREADS");

/// [`WHOAMI`] with threads.
pub const WHOAMI_THREADS: &str = env!("WHOAMI_THREADS");

/// Command with threads: does what its first argument tells it to; its usage lists what it knows.
pub const HOSTILE_THREADS: &str = env!("HOSTILE_THREADS");

/// Command with threads: counts primes with rayon.
pub const PRIMES: &str = env!("PRIMES");

/// Command with threads: `THREADS START END` adds up numbers.
pub const SUM_COMMAND: &str = env!("SUM_COMMAND");

/// Command with threads that others wrote: `b3sum` of the BLAKE3 project, with rayon, as it was published. It prints the
/// hashes of its files.
pub const FOREIGN_THREADS: &str = env!("FOREIGN_THREADS");

/// Command that others wrote: ripgrep, as it was published.
pub const RG: &str = env!("RG");

/// Command that others wrote: `hexyl`, as it was published.
pub const HEXYL: &str = env!("HEXYL");

/// Handler: blurs a picture, the chunks of a PGM, into the output.
pub const BLUR: &str = env!("BLUR");

/// Handler: the Adler-32 checksum of each chunk, or of all of them.
pub const CHECKSUM: &str = env!("CHECKSUM");

/// Handler: misuses windows as its data, or `{"act":…}`, tells it to; its source lists what it knows.
pub const HOSTILE_WINDOWS: &str = env!("HOSTILE_WINDOWS");

/// Handler: counts lines, words and bytes of each chunk, or of all of them.
pub const WORDCOUNT: &str = env!("WORDCOUNT");

/// The directory that all guests are in.
#[must_use]
pub fn dir() -> &'static Path {
    Path::new(env!("GUESTS"))
}
