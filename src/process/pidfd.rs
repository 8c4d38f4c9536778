//! A process by a descriptor of its own: signalled, timed and waited for without ever meeting another one that got its
//! number, and from any thread.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal as RawSignal, WaitId, WaitIdOptions},
};
use tokio::io::unix::AsyncFd;

use super::keeper;
use crate::{outcome::End, signal::Signal};

/// A child of this process. It is killed and reaped when it is dropped.
#[derive(Debug)]
pub(super) struct Pidfd {
    pid: u32,
    fd: AsyncFd<Arc<OwnedFd>>,
    ended: Option<End>,
}

impl Pidfd {
    /// Starts a program. Must be called inside of a runtime, on any thread.
    ///
    /// # Errors
    /// When the system has no room for another process.
    pub(super) fn spawn(command: Command) -> io::Result<Self> {
        Self::of(keeper::spawn(command)?)
    }

    /// As [`Pidfd::spawn`], as a child of the thread that calls.
    ///
    /// # Errors
    /// When the system has no room for another process.
    pub(super) fn spawn_here(mut command: Command) -> io::Result<Self> {
        Self::of(command.spawn()?)
    }

    fn of(mut child: Child) -> io::Result<Self> {
        Self::watch(child.id()).inspect_err(|_| {
            // nobody else would
            let _ = child.kill();
            let _ = child.wait();
        })
    }

    fn watch(pid: u32) -> io::Result<Self> {
        let number = Pid::from_raw(pid.cast_signed()).expect("a process has a number");
        // nobody has waited for it yet, so the number is still its own
        let fd = Arc::new(rustix::process::pidfd_open(number, PidfdFlags::empty())?);
        // SAFETY: the descriptor is the one in the `Arc`, which the `AsyncFd` holds as long as it is registered, and which
        // nobody closes before the last of its owners is gone.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { pid, fd, ended: None })
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.pid
    }

    /// What can signal it from elsewhere, also after it is gone.
    pub(super) fn signaller(&self) -> Signaller {
        Signaller(self.fd.get_ref().clone())
    }

    /// Sends it a signal; whether it was still there.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        send(self.fd.get_ref(), signal)
    }

    /// Sends it a signal after this time, and SIGKILL when it is still there after `grace` more, whoever looks at it then.
    pub(super) fn time(&self, after: Duration, signal: Signal, grace: Duration) -> io::Result<Clock> {
        let fired = Arc::new(AtomicBool::new(false));
        // what nobody waits for any more is not kept for its alarm
        let (theirs, fd) = (fired.clone(), Arc::downgrade(self.fd.get_ref()));
        let alarm = keeper::alarm(after, move || {
            let fd = fd.upgrade()?;
            // before it feels it: whoever sees its end then must know why
            theirs.store(!has_ended(&fd), Ordering::Release);
            if !send(&fd, signal) {
                theirs.store(false, Ordering::Release);
            }
            // a stopped process feels nothing else
            (signal != Signal::KILL).then(|| (grace, Box::new(move || _ = send(&fd, Signal::KILL)) as keeper::Last))
        })?;
        Ok(Clock { fired, _alarm: alarm })
    }

    /// How it ended, once it has.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            if let Some(end) = self.reap(WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                return Poll::Ready(end);
            }
            match ready!(self.fd.poll_read_ready(cx)) {
                Ok(mut guard) => guard.clear_ready(),
                // the runtime is shutting down: its child goes with it
                Err(_) => drop(self.signal(Signal::KILL)),
            }
        }
    }

    /// Waits on this thread for at most `time` until it has ended, if it does.
    pub(super) fn ended_within(&mut self, time: Duration) -> io::Result<Option<End>> {
        let time = Timespec::try_from(time).ok();
        poll(&mut [PollFd::new(self.fd.get_ref().as_ref(), PollFlags::IN)], time.as_ref())?;
        Ok(self.reap(WaitIdOptions::EXITED | WaitIdOptions::NOHANG))
    }

    fn reap(&mut self, options: WaitIdOptions) -> Option<End> {
        if self.ended.is_none() {
            self.ended = loop {
                break match rustix::process::waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), options) {
                    Ok(None) => None,
                    Err(Errno::INTR) => continue,
                    Ok(Some(status)) => Some(match status.exit_status() {
                        Some(code) => End::Exited { code },
                        None => End::Killed { signal: status.terminating_signal().unwrap_or(RawSignal::KILL.as_raw()) },
                    }),
                    // somebody else has reaped it: the program waits for all its children, or ignores SIGCHLD
                    Err(_) => Some(End::Killed { signal: RawSignal::KILL.as_raw() }),
                };
            };
        }
        self.ended.clone()
    }
}

impl Drop for Pidfd {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.signal(Signal::KILL);
            // takes as long as the kernel needs to end it
            self.reap(WaitIdOptions::EXITED);
        }
    }
}

/// Whether a process has ended, be it waited for or not.
fn has_ended(fd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready == 1)
}

/// Sends a signal to a process that has not ended: the system would take one for what is left of it, too.
fn send(fd: &OwnedFd, signal: Signal) -> bool {
    if has_ended(fd) {
        return false;
    }
    match RawSignal::from_named_raw(signal.number()) {
        Some(signal) => rustix::process::pidfd_send_signal(fd, signal).is_ok(),
        None => false,
    }
}

/// Signals a process, whoever else waits for it.
#[derive(Debug, Clone)]
pub(crate) struct Signaller(Arc<OwnedFd>);

impl Signaller {
    /// Sends it a signal; whether it was still there.
    pub(crate) fn send(&self, signal: Signal) -> bool {
        send(&self.0, signal)
    }
}

/// A time limit that runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Clock {
    fired: Arc<AtomicBool>,
    _alarm: keeper::Alarm,
}

impl Clock {
    /// Whether the process was still there when its time was over.
    pub(crate) fn has_fired(&self) -> bool {
        self.fired.load(Ordering::Acquire)
    }
}
