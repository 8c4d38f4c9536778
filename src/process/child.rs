//! The child's end: how a process becomes a worker, and what it says while it is one.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::Command,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags},
    process::Pid,
    thread::UnshareFlags,
};

use crate::process::{
    ARG0, FDS_MAX, Hello, jail,
    wire::{Incoming, Kind, Outgoing, VERSION},
};

/// What a child starts with.
#[derive(Debug)]
pub(crate) struct Start {
    /// The line to the primary.
    pub(crate) socket: UnixStream,
    /// Who it is and what to do.
    pub(crate) hello: Hello,
    /// The descriptors that came with the hello, in order.
    pub(crate) fds: Vec<OwnedFd>,
    /// Bytes that came after the hello, ...
    pub(crate) incoming: Incoming,
    /// ... and the descriptors that came with them.
    pub(crate) following: VecDeque<OwnedFd>,
}

/// Whether this process was started as a child of a primary, by its own name.
pub(crate) fn is_child() -> bool {
    std::env::args_os().next().is_some_and(|arg| arg == ARG0)
}

/// Lets malloc keep what is freed. By default glibc gives a large buffer back to the system when it is freed, so that
/// every message of a few hundred KiB would find its pages anew, one fault each; and one arena is enough for a process
/// with one busy thread.
fn keep_buffers() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_MMAP_THRESHOLD, 64 << 20), (libc::M_TRIM_THRESHOLD, 64 << 20), (libc::M_ARENA_MAX, 1)]
    {
        // SAFETY: sets a number inside of malloc; the process has one thread yet, as `init` asks its caller to see to.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Closes all descriptors from `first` on.
pub(super) fn close_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: closes what this process was started with and knows nothing of: `init` asks its caller to come first, so
    // that nobody here has opened a descriptor yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if closed == 0 {
        return Ok(());
    }
    // a kernel before Linux 5.9, or one that is told to be like it: one by one
    let open =
        std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for number in open.collect::<Vec<libc::c_int>>().into_iter().filter(|number| number.cast_unsigned() >= first) {
        // SAFETY: as above; one of the list is that of the list itself, which is closed by now.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// Leaves the users and the IPC of the system for its own, and its network if that is wanted. What is open stays usable.
pub(super) fn enter_namespaces(network: bool) -> io::Result<()> {
    let mut own = UnshareFlags::NEWUSER | UnshareFlags::NEWIPC;
    own.set(UnshareFlags::NEWNET, network);
    // SAFETY: descriptors are not among what is left.
    Ok(unsafe { rustix::thread::unshare_unsafe(own) }?)
}

/// Lets a program start with all signals as they are by default, when this process ignores some. Whoever is started in the
/// background of a script does, and all that it starts would, too: what ends a process shall end a child.
pub(super) fn reset_ignored_signals(command: &mut Command) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    // that of a closed pipe is reset anyhow
    let is_ignored = |number: &libc::c_int| *number != libc::SIGPIPE && ignored >> (number - 1) & 1 == 1;
    let ignored: Vec<_> = (1..=31).filter(is_ignored).collect();
    if ignored.is_empty() {
        return;
    }
    // SAFETY: between fork and exec this calls nothing but `signal`, which may be called there.
    unsafe {
        command.pre_exec(move || {
            for number in &ignored {
                libc::signal(*number, libc::SIG_DFL);
            }
            Ok(())
        });
    }
}

/// Lets a write beyond the largest size of a file fail instead of ending the process.
pub(super) fn ignore_file_size_signal() {
    // SAFETY: sets a signal to be ignored, for which nothing in this process has a handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Ties this process to its primary and waits for the hello.
///
/// # Errors
/// When whoever started this process speaks another language, or is gone.
pub(crate) fn start() -> io::Result<Start> {
    jail::begin()?;
    keep_buffers();
    let _ = rustix::thread::set_name(c"wrun-worker");
    // SAFETY: descriptor 0 is open (the runtime sees to that), this process owns it, and `start` is called once, before
    // anybody asks for standard input, which a child does not use.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());

    let (mut incoming, mut fds, mut bytes) = (Incoming::new(u32::MAX), VecDeque::new(), vec![0; RECEIVED]);
    let hello: Hello = loop {
        match incoming.next().map_err(io::Error::other)? {
            Some(frame) if frame.kind == Kind::Hello => {
                break serde_json::from_slice(frame.body).map_err(|error| invalid(&error.to_string()))?;
            }
            Some(_) => return Err(invalid("expected a hello")),
            None => {}
        }
        // what follows the hello may come with it, and so may the descriptors of that
        match receive_more(&socket, &mut bytes, &mut incoming, &mut fds, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            received => _ = received?,
        }
    };
    if hello.version != VERSION {
        return Err(invalid("the primary is another version of wrun"));
    }
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(hello.parent) {
        return Err(invalid("the primary is gone"));
    }
    let following = fds.split_off(hello.fds.min(fds.len()));
    Ok(Start { socket, hello, fds: fds.into(), incoming, following })
}

/// How much is received at once while there is no hello.
const RECEIVED: usize = 16 << 10;

/// Receives some bytes, by way of a buffer, and the descriptors that come with them. How many bytes. What lacks of a long
/// frame, with which no descriptor can come any more, goes where it belongs at once.
///
/// # Errors
/// As the system says.
pub(crate) fn receive_more(
    socket: impl AsFd,
    buffer: &mut [u8],
    incoming: &mut Incoming,
    fds: &mut VecDeque<OwnedFd>,
    flags: RecvFlags,
) -> rustix::io::Result<usize> {
    let missing = incoming.missing();
    if missing >= buffer.len() {
        let space = incoming.space();
        let length = space.len();
        let (_, received) = rustix::net::recv(&socket, &mut space.spare_capacity_mut()[..missing], flags)?;
        // SAFETY: the system has written so many bytes behind those that were there.
        unsafe { space.set_len(length + received) };
        return Ok(received);
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [io::IoSliceMut::new(buffer)];
    let received = rustix::net::recvmsg(socket, &mut slices, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)?.bytes;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    incoming.space().extend_from_slice(&buffer[..received]);
    Ok(received)
}

/// What a child has to say, written in batches by whoever comes by: the thread that runs the guest when it has a
/// moment, another one when it has none.
#[derive(Debug)]
pub(crate) struct Out {
    socket: UnixStream,
    queue: Mutex<Outgoing>,
    waiting: AtomicBool,
}

impl Out {
    /// Speaks on the socket.
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket, queue: Mutex::default(), waiting: AtomicBool::new(false) }
    }

    fn queue(&self) -> MutexGuard<'_, Outgoing> {
        // the queue is whole after every call on it, whoever panicked
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame, and answers how many bytes wait now.
    pub(crate) fn push(&self, kind: Kind, id: u64, body: &[u8]) -> usize {
        let mut queue = self.queue();
        queue.push(kind, id, body);
        self.waiting.store(true, Ordering::Relaxed);
        queue.pending().len()
    }

    /// Whether anything waits.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// How many bytes wait.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.queue().pending().len()
    }

    /// Writes what can be written without waiting; whether all of it was.
    ///
    /// # Errors
    /// When the primary is gone.
    pub(crate) fn flush(&self) -> io::Result<bool> {
        if !self.is_waiting() {
            return Ok(true);
        }
        let mut queue = self.queue();
        while !queue.pending().is_empty() {
            // the socket itself may be a blocking one: whoever reads from it decides
            match rustix::net::send(&self.socket, queue.pending(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => queue.advance(count),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.waiting.store(false, Ordering::Relaxed);
        Ok(true)
    }

    /// Writes all of it, and waits as long as that takes.
    pub(crate) fn finish(&self) {
        while let Ok(false) = self.flush() {
            let mut wait = [rustix::event::PollFd::new(&self.socket, rustix::event::PollFlags::OUT)];
            if !matches!(rustix::event::poll(&mut wait, None), Ok(_) | Err(Errno::INTR)) {
                return;
            }
        }
    }

    /// Waits until the primary has closed its end.
    pub(crate) fn wait_until_cut(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        // what hangs up is told of without being asked for
        while let Err(Errno::INTR) = poll(&mut [PollFd::new(&self.socket, PollFlags::empty())], None) {}
    }

    /// Whether the primary has closed its end.
    pub(crate) fn is_cut(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut wait = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut wait, Some(&now)).is_ok() && wait[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

/// Lets a panic of this process be heard by the primary: a child has no standard error of its own.
pub(crate) fn report_panics(out: &'static Out) {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        std::panic::set_hook(Box::new(move |info| {
            // the thread that panics may hold the queue: then the news must do without it
            if let Ok(mut queue) = out.queue.try_lock() {
                queue.push(Kind::Panic, 0, info.to_string().as_bytes());
                out.waiting.store(true, Ordering::Relaxed);
            }
            let _ = out.flush();
        }));
    });
}
