//! WASI preview 1 for a group: one table of files, one environment, one set of standard streams, whichever thread asks.
//!
//! The engine's WASI keeps its state per store and has no threads. Here one context stands behind a lock, and each call
//! borrows it: a file that one thread opens, another one reads. What may take long never holds the lock: the standard
//! streams, sleeping, and the clocks are done here, on the thread that asks, and a sleep ends when the group is stopped. So
//! what is left behind the lock are calls for files, which one thread makes at a time.
//!
//! The functions that are called are those which the engine's own linker calls. They are public, though meant for that
//! only; the version of the engine is pinned.

#![expect(clippy::needless_pass_by_value, reason = "the shape of a host call is given")]

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, PoisonError, RwLock},
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno as HostErrno,
};
use wasmtime::{Caller, Linker};
use wasmtime_wasi::{
    I32Exit,
    p1::{
        WasiP1Ctx,
        types::Errno,
        wasi_snapshot_preview1::{self as p1, WasiSnapshotPreview1 as _},
    },
};
use wiggle::GuestMemory;

use super::{State, memory::Memory, parking::Stopped};
use crate::{
    event::Stream,
    sandbox::{
        instance::HOSTCALL_BYTES,
        stdio::{CHUNK, Output, ReaderGone, Stdio},
    },
};

const MODULE: &str = "wasi_snapshot_preview1";

/// What the threads of a group have of WASI.
pub(super) struct Wasi {
    files: Mutex<WasiP1Ctx>,
    /// Which descriptors are standard streams.
    streams: RwLock<Vec<(i32, Std)>>,
    stdout: Output,
    stderr: Output,
    /// Whether standard input is this process's.
    has_input: bool,
    /// When the monotonic clock began.
    started: Instant,
    /// What one call may make the host copy.
    hostcall_bytes: usize,
}

/// A standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Std {
    In,
    Out,
    Err,
}

impl Wasi {
    pub(super) fn new(files: WasiP1Ctx, stdio: &Stdio, has_input: bool, memory: usize) -> Self {
        let output = |stream| match stdio {
            Stdio::Inherit => Output::Own(stream),
            Stdio::Sink(sink) | Stdio::Piped(_, sink) => Output::Sink(stream, sink.clone()),
        };
        Self {
            files: Mutex::new(files),
            streams: RwLock::new(vec![(0, Std::In), (1, Std::Out), (2, Std::Err)]),
            stdout: output(Stream::Stdout),
            stderr: output(Stream::Stderr),
            has_input,
            started: Instant::now(),
            // as for other modules: a whole file may go through one buffer
            hostcall_bytes: memory.saturating_add(HOSTCALL_BYTES),
        }
    }

    /// Runs with the files, in one thread at a time.
    fn with_files<T>(&self, run: impl FnOnce(&mut WasiP1Ctx) -> T) -> T {
        // a thread that panicked in there has ended its group
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.set_hostcall_fuel(self.hostcall_bytes);
        run(&mut files)
    }

    fn stream(&self, fd: i32) -> Option<Std> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.iter().find_map(|(number, stream)| (*number == fd).then_some(*stream))
    }

    fn write(
        &self,
        memory: &Memory<'_>,
        stream: Std,
        buffers: i32,
        count: i32,
    ) -> wasmtime::Result<Result<u32, Errno>> {
        let mut bytes = Vec::new();
        let gathered = memory.buffers(buffers, count, CHUNK, |memory, pointer, length| {
            bytes.extend_from_slice(&memory.read(pointer, length)?);
            Ok(length)
        });
        let written = match gathered {
            Ok(written) => written,
            Err(errno) => return Ok(Err(errno)),
        };
        let output = match stream {
            Std::Out => &self.stdout,
            Std::Err => &self.stderr,
            Std::In => return Ok(Err(Errno::Badf)),
        };
        match output.write_all(&bytes) {
            Ok(()) => Ok(Ok(written)),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
            Err(_) => Ok(Err(Errno::Io)),
        }
    }

    fn read(&self, memory: &Memory<'_>, stream: Std, buffers: i32, count: i32) -> Result<u32, Errno> {
        if stream != Std::In {
            return Err(Errno::Badf);
        }
        let room = memory.buffers(buffers, count, CHUNK, |_, _, length| Ok(length))?;
        let mut bytes = vec![0; room as usize];
        let read = if self.has_input { read_input(&mut bytes)? } else { 0 };
        let mut rest = &bytes[..read];
        memory.buffers(buffers, count, read, |memory, pointer, length| {
            let (now, later) = rest.split_at(rest.len().min(length as usize));
            rest = later;
            memory.write(pointer, now)?;
            Ok(u32::try_from(now.len()).expect("no longer than the buffer"))
        })
    }
}

/// Reads from this process's standard input, as much as there is.
fn read_input(bytes: &mut [u8]) -> Result<usize, Errno> {
    let input = rustix::stdio::stdin();
    loop {
        match rustix::io::read(input, &mut *bytes) {
            Ok(count) => return Ok(count),
            Err(HostErrno::INTR) => {}
            // somebody we share the terminal or pipe with has made it non-blocking
            Err(HostErrno::AGAIN) => _ = poll(&mut [PollFd::new(&input, PollFlags::IN)], None),
            Err(_) => return Err(Errno::Io),
        }
    }
}

/// Polls a future of the engine's WASI to its end on this thread. It is ready at once, unless the file is a special one.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Hands calls to the engine's WASI: those that answer at once, and those that are futures.
macro_rules! pass_on {
    ($linker:ident, $wait:path: $($name:ident($($argument:ident: $type:ty),*);)*) => {
        $($linker.func_wrap(MODULE, stringify!($name), |caller: Caller<'_, State>, $($argument: $type),*| {
            let group = caller.data().group();
            let mut memory = GuestMemory::Shared(group.memory.data());
            group.wasi.with_files(|files| $wait(p1::$name(files, &mut memory, $($argument),*)))
        })?;)*
    };
}

/// Links it.
pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    pass_on! { linker, std::convert::identity:
        args_get(a: i32, b: i32);
        args_sizes_get(a: i32, b: i32);
        environ_get(a: i32, b: i32);
        environ_sizes_get(a: i32, b: i32);
        fd_allocate(a: i32, b: i64, c: i64);
        fd_fdstat_set_flags(a: i32, b: i32);
        fd_fdstat_set_rights(a: i32, b: i64, c: i64);
        fd_prestat_dir_name(a: i32, b: i32, c: i32);
        fd_prestat_get(a: i32, b: i32);
        fd_tell(a: i32, b: i32);
        proc_raise(a: i32);
        random_get(a: i32, b: i32);
        sock_accept(a: i32, b: i32, c: i32);
        sock_recv(a: i32, b: i32, c: i32, d: i32, e: i32, f: i32);
        sock_send(a: i32, b: i32, c: i32, d: i32, e: i32);
        sock_shutdown(a: i32, b: i32);
    }
    pass_on! { linker, block_on:
        fd_advise(a: i32, b: i64, c: i64, d: i32);
        fd_datasync(a: i32);
        fd_fdstat_get(a: i32, b: i32);
        fd_filestat_get(a: i32, b: i32);
        fd_filestat_set_size(a: i32, b: i64);
        fd_filestat_set_times(a: i32, b: i64, c: i64, d: i32);
        fd_pread(a: i32, b: i32, c: i32, d: i64, e: i32);
        fd_pwrite(a: i32, b: i32, c: i32, d: i64, e: i32);
        fd_readdir(a: i32, b: i32, c: i32, d: i64, e: i32);
        fd_seek(a: i32, b: i64, c: i32, d: i32);
        fd_sync(a: i32);
        path_create_directory(a: i32, b: i32, c: i32);
        path_filestat_get(a: i32, b: i32, c: i32, d: i32, e: i32);
        path_filestat_set_times(a: i32, b: i32, c: i32, d: i32, e: i64, f: i64, g: i32);
        path_link(a: i32, b: i32, c: i32, d: i32, e: i32, f: i32, g: i32);
        path_open(a: i32, b: i32, c: i32, d: i32, e: i32, f: i64, g: i64, h: i32, i: i32);
        path_readlink(a: i32, b: i32, c: i32, d: i32, e: i32, f: i32);
        path_remove_directory(a: i32, b: i32, c: i32);
        path_rename(a: i32, b: i32, c: i32, d: i32, e: i32, f: i32);
        path_symlink(a: i32, b: i32, c: i32, d: i32, e: i32);
        path_unlink_file(a: i32, b: i32, c: i32);
    }
    linker.func_wrap(MODULE, "fd_write", fd_write)?;
    linker.func_wrap(MODULE, "fd_read", fd_read)?;
    linker.func_wrap(MODULE, "fd_close", fd_close)?;
    linker.func_wrap(MODULE, "fd_renumber", fd_renumber)?;
    linker.func_wrap(MODULE, "clock_res_get", clock_res_get)?;
    linker.func_wrap(MODULE, "clock_time_get", clock_time_get)?;
    linker.func_wrap(MODULE, "poll_oneoff", poll_oneoff)?;
    linker.func_wrap(MODULE, "sched_yield", |caller: Caller<'_, State>| {
        std::thread::yield_now();
        caller.data().check_stopped()
    })?;
    linker.func_wrap(MODULE, "proc_exit", |code: i32| -> wasmtime::Result<()> { Err(I32Exit(code).into()) })?;
    Ok(())
}

/// An errno as WASI returns it; nothing is success.
fn code(result: Result<(), Errno>) -> i32 {
    u16::from(result.err().unwrap_or(Errno::Success)).into()
}

fn fd_write(caller: Caller<'_, State>, fd: i32, buffers: i32, count: i32, written: i32) -> wasmtime::Result<i32> {
    let group = caller.data().group();
    let Some(stream) = group.wasi.stream(fd) else {
        let mut memory = GuestMemory::Shared(group.memory.data());
        return group.wasi.with_files(|files| block_on(p1::fd_write(files, &mut memory, fd, buffers, count, written)));
    };
    let memory = Memory(&group.memory);
    let count = group.wasi.write(&memory, stream, buffers, count)?;
    Ok(code(count.and_then(|count| memory.write(written.cast_unsigned(), &count.to_le_bytes()))))
}

fn fd_read(caller: Caller<'_, State>, fd: i32, buffers: i32, count: i32, read: i32) -> wasmtime::Result<i32> {
    let group = caller.data().group();
    let Some(stream) = group.wasi.stream(fd) else {
        let mut memory = GuestMemory::Shared(group.memory.data());
        return group.wasi.with_files(|files| block_on(p1::fd_read(files, &mut memory, fd, buffers, count, read)));
    };
    let memory = Memory(&group.memory);
    let count = group.wasi.read(&memory, stream, buffers, count);
    Ok(code(count.and_then(|count| memory.write(read.cast_unsigned(), &count.to_le_bytes()))))
}

fn fd_close(caller: Caller<'_, State>, fd: i32) -> wasmtime::Result<i32> {
    let group = caller.data().group();
    let mut memory = GuestMemory::Shared(group.memory.data());
    group.wasi.with_files(|files| {
        let result = block_on(p1::fd_close(files, &mut memory, fd))?;
        if result == 0 {
            let mut streams = group.wasi.streams.write().unwrap_or_else(PoisonError::into_inner);
            streams.retain(|(number, _)| *number != fd);
        }
        Ok(result)
    })
}

fn fd_renumber(caller: Caller<'_, State>, from: i32, to: i32) -> wasmtime::Result<i32> {
    let group = caller.data().group();
    let mut memory = GuestMemory::Shared(group.memory.data());
    group.wasi.with_files(|files| {
        let result = block_on(p1::fd_renumber(files, &mut memory, from, to))?;
        if result == 0 && from != to {
            let mut streams = group.wasi.streams.write().unwrap_or_else(PoisonError::into_inner);
            streams.retain(|(number, _)| *number != to);
            streams.iter_mut().filter(|(number, _)| *number == from).for_each(|(number, _)| *number = to);
        }
        Ok(result)
    })
}

/// The clocks that there are: that of the wall, and one that only goes forward.
const REALTIME: i32 = 0;
const MONOTONIC: i32 = 1;

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Wasi {
    fn time(&self, clock: i32) -> Option<u64> {
        match clock {
            REALTIME => Some(nanos(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())),
            MONOTONIC => Some(nanos(self.started.elapsed())),
            _ => None,
        }
    }
}

fn clock_res_get(caller: Caller<'_, State>, clock: i32, result: i32) -> i32 {
    let known = matches!(clock, REALTIME | MONOTONIC).then_some(1u64).ok_or(Errno::Badf);
    let memory = Memory(&caller.data().group().memory);
    code(known.and_then(|nanos| memory.write(result.cast_unsigned(), &nanos.to_le_bytes())))
}

fn clock_time_get(caller: Caller<'_, State>, clock: i32, _precision: i64, result: i32) -> i32 {
    let group = caller.data().group();
    let time = group.wasi.time(clock).ok_or(Errno::Badf);
    code(time.and_then(|nanos| Memory(&group.memory).write(result.cast_unsigned(), &nanos.to_le_bytes())))
}

/// What a thread waits for.
struct Subscription {
    /// Comes back with the event.
    userdata: [u8; 8],
    kind: u8,
    waits: Waits,
}

enum Waits {
    /// For a time.
    Until(Instant),
    /// For something to be there on standard input.
    Input,
    /// For nothing: files, and what is written to, are always ready.
    Ready,
    /// It cannot.
    Refused(Errno),
}

impl Subscription {
    const SIZE: u32 = 48;
    const CLOCK: u8 = 0;
    const READ: u8 = 1;
    const WRITE: u8 = 2;

    fn read(wasi: &Wasi, bytes: &[u8], now: Instant) -> Result<Self, Errno> {
        let word = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let kind = bytes[8];
        let waits = match kind {
            Self::CLOCK => match (wasi.time(word(16)), word(40) & 1) {
                (None, _) => Waits::Refused(Errno::Inval),
                // what the clock cannot count to never comes
                (Some(time), is_absolute) => {
                    let time = if is_absolute == 1 { long(24).saturating_sub(time) } else { long(24) };
                    let far = Duration::from_secs(1 << 32);
                    Waits::Until(now.checked_add(Duration::from_nanos(time)).unwrap_or(now + far))
                }
            },
            Self::READ if wasi.stream(word(16)) == Some(Std::In) && wasi.has_input => Waits::Input,
            Self::READ | Self::WRITE => match (wasi.stream(word(16)), kind) {
                (Some(Std::Out | Std::Err), Self::READ) | (Some(Std::In), Self::WRITE) => Waits::Refused(Errno::Badf),
                _ => Waits::Ready,
            },
            _ => return Err(Errno::Inval),
        };
        Ok(Self { userdata: bytes[..8].try_into().expect("eight bytes"), kind, waits })
    }

    /// Its event, if that has happened.
    fn event(&self, now: Instant, has_input: bool) -> Option<[u8; 32]> {
        let error = match self.waits {
            Waits::Until(time) if time <= now => Errno::Success,
            Waits::Input if has_input => Errno::Success,
            Waits::Ready => Errno::Success,
            Waits::Refused(errno) => errno,
            Waits::Until(_) | Waits::Input => return None,
        };
        let mut event = [0; 32];
        event[..8].copy_from_slice(&self.userdata);
        event[8..10].copy_from_slice(&u16::from(error).to_le_bytes());
        event[10] = self.kind;
        // how much there is, nobody knows: at least something
        event[16] = u8::from(self.kind != Self::CLOCK);
        Some(event)
    }
}

/// The most that one call may wait for.
const SUBSCRIPTIONS_MAX: u32 = 1024;

fn poll_oneoff(
    caller: Caller<'_, State>,
    subscriptions: i32,
    events: i32,
    count: i32,
    happened: i32,
) -> wasmtime::Result<i32> {
    let group = caller.data().group();
    let memory = Memory(&group.memory);
    let count = count.cast_unsigned();
    if count == 0 || count > SUBSCRIPTIONS_MAX {
        return Ok(code(Err(Errno::Inval)));
    }
    let read = memory.read(subscriptions.cast_unsigned(), count * Subscription::SIZE).and_then(|bytes| {
        let now = Instant::now();
        let chunks = bytes.chunks_exact(Subscription::SIZE as usize);
        chunks.map(|bytes| Subscription::read(&group.wasi, bytes, now)).collect::<Result<Vec<_>, _>>()
    });
    let subscriptions = match read {
        Ok(subscriptions) => subscriptions,
        Err(errno) => return Ok(code(Err(errno))),
    };
    let for_input = subscriptions.iter().any(|one| matches!(one.waits, Waits::Input));
    let is_ready = subscriptions.iter().any(|one| matches!(one.waits, Waits::Ready | Waits::Refused(_)));
    let times = subscriptions.iter().filter_map(|one| match one.waits {
        Waits::Until(time) => Some(time),
        _ => None,
    });
    let until = if is_ready { Some(Instant::now()) } else { times.min() };
    let mut has_input = false;
    if for_input {
        // only a process of the guest's own has an input, and is ended as a whole
        has_input = wait_for_input(until);
    } else {
        group.parking.sleep(until).map_err(|Stopped| State::interrupted())?;
    }
    let now = Instant::now();
    let events_now: Vec<_> = subscriptions.iter().filter_map(|one| one.event(now, has_input)).collect();
    let count = u32::try_from(events_now.len()).expect("no more than subscriptions");
    let written = memory.write(events.cast_unsigned(), events_now.as_flattened());
    Ok(code(written.and_then(|()| memory.write(happened.cast_unsigned(), &count.to_le_bytes()))))
}

/// Waits for something on standard input until then, or for ever; whether it is there.
fn wait_for_input(until: Option<Instant>) -> bool {
    let input = rustix::stdio::stdin();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let time = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], time.as_ref()) {
            Ok(0) if left == Some(Duration::ZERO) => return false,
            Ok(0) | Err(HostErrno::INTR) => {}
            // whatever it is, reading tells
            _ => return true,
        }
    }
}
