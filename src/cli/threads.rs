//! `wrun threads`: its flags, and the command that they describe.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    num::NonZero,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use clap::Args;
use wrun::{Buffer, Command, Error, ParMap, command::Stdio, limits::Bytes};

use super::command::ChildArgs;

/// Run one guest on all cores, on one shared memory or on the chunks of one file
///
/// With --input the guest is a handler that is a component, in any language. The file is read once, as it is now; each of -t
/// threads hands chunks of it to an instance of its own, which has them as windows in its memory: `wrun:guest/window`. Each
/// call gets `{"chunk":K,"offset":O,"length":L}`, and the replies come on standard output, one line each, in order. The first
/// chunk that fails ends all.
///
/// Without, the guest is a core module that imports a shared memory, as `--target wasm32-wasip1-threads` makes them. A command makes
/// its threads itself; it is told how many to make in `RAYON_NUM_THREADS` and `OMP_NUM_THREADS`. Of a handler
/// (`wrun:guest/handler`) wrun makes -t workers: each handles one message, the --data, or with --tasks a line of the input
/// whenever it is free. What they reply comes on standard output, one line each, `{"worker":ID,"reply":…}`; what they print
/// goes to standard error.
///
/// All threads are in one process of their own and end together: with the first that traps or exits, at the --timeout, or
/// with wrun, whatever ends that.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun threads -t 2 --data '{\"start\":0,\"end\":1000000}' sum.threads.wasm\n  \
    seq 9 | wrun threads --tasks - fib.threads.wasm\n  wrun threads -t 4 primes.wasm -- 1000000\n  \
    wrun threads --input words.txt --lines --reduce wordcount.wasm\n  \
    wrun threads --input photo.pgm --output blurred.pgm --overlap 4KiB blur.wasm")]
pub(crate) struct ThreadsArgs {
    #[command(flatten)]
    pub(crate) child: ChildArgs,
    /// How many workers it has [default: one for each core]
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Workers")]
    workers: Option<u32>,
    /// JSON lines, each a task for whichever worker is free; `-` is standard input
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    tasks: Option<PathBuf>,
    /// Keep each worker on one core
    #[arg(long, help_heading = "Workers")]
    pin: bool,
    #[command(flatten)]
    chunks: ChunkArgs,
    /// The longest message, either way
    #[arg(long, value_name = "SIZE", default_value = "1MiB", help_heading = "Limits")]
    message_max: Bytes,
}

/// A file that is handed out in chunks.
#[derive(Debug, Args)]
#[command(next_help_heading = "Chunks")]
struct ChunkArgs {
    /// The file that is handed out in chunks, the buffer `input` of the guest; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "tasks")]
    input: Option<PathBuf>,
    /// Where the buffer `output` goes when all is done, as long as the input, of which each chunk writes its own range
    #[arg(long, value_name = "FILE", requires = "input")]
    output: Option<PathBuf>,
    /// How many bytes a chunk has
    #[arg(long, value_name = "SIZE", default_value = "4MiB", requires = "input", value_parser = parse_chunk)]
    chunk: Bytes,
    /// Cut behind the ends of lines only: a chunk goes on to the end of its last line
    #[arg(long, requires = "input")]
    lines: bool,
    /// How many bytes before and after it each chunk's window has, too
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "0",
        hide_default_value = true,
        requires = "input",
        conflicts_with = "lines"
    )]
    overlap: Bytes,
    /// Hand all replies, as one array, to a last call, and print its reply alone
    #[arg(long, requires = "input")]
    reduce: bool,
    /// The largest input
    #[arg(long, value_name = "SIZE", default_value = "8GiB", requires = "input", help_heading = "Limits")]
    input_max: Bytes,
}

fn parse_chunk(text: &str) -> Result<Bytes, String> {
    match text.parse::<Bytes>()? {
        Bytes(0) => Err("expected a byte or more".into()),
        size => Ok(size),
    }
}

/// A file that is written when all is done, and is as it was when it is not.
pub(crate) struct Output {
    file: File,
    path: PathBuf,
    /// Whether it was not there before, and goes again when this is dropped.
    is_new: bool,
}

impl Output {
    /// Opens it, so that it shows before any work that it cannot be written.
    fn open(path: PathBuf) -> Result<Self, Error> {
        let mut options = File::options();
        let opened = match options.write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                options.create_new(false).open(&path).map(|file| (file, false))
            }
            made => made.map(|file| (file, true)),
        };
        match opened {
            Ok((file, is_new)) => Ok(Self { file, path, is_new }),
            Err(error) => Err(Error::Usage(format!("could not open the output, `{}`: {error}", path.display()))),
        }
    }

    /// Writes it, in place of what was there.
    pub(crate) fn write(mut self, bytes: &[u8]) -> Result<(), Error> {
        self.is_new = false;
        let cut = |file: &File| {
            // what else there may be has no length
            if file.metadata()?.is_file() { file.set_len(bytes.len() as u64) } else { Ok(()) }
        };
        let written = self.file.write_all(bytes).and_then(|()| cut(&self.file));
        written.map_err(|source| {
            tracing::error!("`{}` is not whole", self.path.display());
            Error::Io { what: "write the output", source }
        })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.is_new {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl ThreadsArgs {
    /// Whether workers get tasks, and not each the data.
    pub(crate) fn has_tasks(&self) -> bool {
        self.tasks.is_some()
    }

    /// Where the tasks of workers come from.
    pub(crate) fn input(&self) -> Result<Box<dyn Read + Send>, Error> {
        Ok(match self.tasks.as_deref() {
            None => Box::new(io::empty()),
            Some(path) if path == Path::new("-") => Box::new(io::stdin()),
            Some(path) => {
                Box::new(File::open(path).map_err(|error| {
                    Error::Usage(format!("could not open the tasks, `{}`: {error}", path.display()))
                })?)
            }
        })
    }

    /// How many threads.
    fn threads(&self) -> u32 {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        self.workers.unwrap_or_else(|| u32::try_from(cores()).unwrap_or(u32::MAX))
    }

    /// The chunks that are to be handed out, if any, and where the output goes.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub(crate) fn chunks(&self) -> Result<Option<(ParMap, Option<Output>)>, Error> {
        let ChunkArgs { input, output, chunk, lines, overlap, reduce, input_max } = &self.chunks;
        let Some(path) = input else { return Ok(None) };
        let output = output.clone().map(Output::open).transpose()?;
        let buffer = if path == Path::new("-") {
            Buffer::from_reader(io::stdin().lock(), *input_max)
        } else {
            File::open(path).and_then(|file| Buffer::read_by(self.threads() as usize, &file, *input_max))
        };
        let buffer = buffer.map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::FileTooLarge { " (--input-max)" } else { "" };
            Error::Usage(format!("could not read the input, `{}`: {error}{hint}", path.display()))
        })?;
        let chunks = buffer.split(*chunk);
        let mut map = ParMap::over(if *lines { chunks.lines() } else { chunks.overlap(*overlap) });
        if output.is_some() {
            let zeros = Buffer::zeroed(buffer.length());
            map = map.output(zeros.map_err(|source| Error::Io { what: "make the output", source })?);
        }
        Ok(Some((if *reduce { map.reduce() } else { map }, output)))
    }

    /// The command that the flags describe, with the streams of a program.
    pub(crate) fn command(self) -> Result<Command, Error> {
        if self.child.reads_input() {
            return Err(Error::Usage("expected a file for the guest, found standard input".into()));
        }
        let workers = self.threads();
        let has_tasks = self.has_tasks();
        let mut command = self.child.command(self.message_max)?;
        command.workers(workers).pin(self.pin).tasks(has_tasks);
        Ok(command)
    }
}

/// Sends what workers print to standard error: their replies are on standard output.
///
/// # Errors
/// When there is no room for a descriptor.
pub(crate) fn print_aside(command: &mut Command) -> Result<(), Error> {
    let stderr = || io::stderr().as_fd().try_clone_to_owned();
    let cannot = |source| Error::Io { what: "share standard error", source };
    command.stdin(Stdio::null()).stdout(stderr().map_err(cannot)?).stderr(stderr().map_err(cannot)?);
    Ok(())
}
