//! The second wall: what the system lets a child do, whatever its guest makes of it.
//!
//! The engine is the first wall. Should a guest get through that, it is native code in a process that can reach nothing
//! and spend little: it has no descriptor that it was not given, sees no file outside of the folders granted to its
//! guest, connects to no port but those, and makes no system call that a worker does not need. Everything here holds for a
//! process and what it starts, and nothing of it can be taken back.

use std::{io, time::Duration};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::{
    process::{Resource, Rlimit, Signal, setrlimit},
    thread::{CapabilitySet, CapabilitySets},
};
use serde::{Deserialize, Serialize};

use super::filter::{Files, Filter};
use crate::{grant::DirGrant, limits::Bytes};

/// What stands between a guest and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// The engine alone: the guest runs in this process.
    Thread,
    /// A process of its own, with every wall that the system has; those that it has not are told of.
    Process,
    /// A process of its own, with every wall, or not at all.
    Jail,
}

/// What one child may still do when it is inside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Jail {
    /// Whether the child gives up when a wall is missing.
    pub(crate) required: bool,
    /// The folders that it may use.
    pub(crate) dirs: Vec<DirGrant>,
    /// The TCP ports that it may connect to, on whatever host. With none it has no sockets.
    pub(crate) ports: Vec<u16>,
    /// What it is for.
    pub(crate) purpose: Purpose,
    /// Whether it leaves the users and the IPC of the system, and without ports its network, where that is allowed. No
    /// other wall needs it, and the kernel takes its time for it.
    pub(crate) namespaces: bool,
    /// How many threads its guest may have beside the first, which are spread over the cores.
    pub(crate) threads: u32,
    /// What it may spend.
    pub(crate) bounds: Bounds,
    /// Walls that are left out, so that the others can be seen to hold alone; none for a child that gets a guest.
    pub(crate) without: Vec<Wall>,
}

/// What a child is for, and what it needs for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Purpose {
    /// To run a guest on what it was given.
    Guest,
    /// To run one for those who connect to the listener that it was given.
    Port,
    /// To pass on what comes to the listener that it was given, over sockets that it makes in pairs.
    Router,
    /// To compile one: it sees that what it made can be linked, and so makes memory executable.
    Compiler,
}

/// What a process may spend. The system ends it, or refuses it more.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Bounds {
    /// CPU time, in whole seconds; none for one that works as long as there is work.
    pub(crate) cpu: Option<Duration>,
    /// Descriptors.
    pub(crate) files: u64,
    /// The size of a file that it writes.
    pub(crate) file_size: Bytes,
    /// Memory that it can write to, touched or not. Not its address space, of which the engine reserves terabytes.
    pub(crate) data: Bytes,
}

/// A part of the jail that a system may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wall {
    /// Rules for files, ports and signals, by Landlock.
    Landlock,
    /// The list of system calls, by seccomp.
    Seccomp,
    /// That root is a name only. Nobody lacks it.
    Privileges,
}

/// The walls that are not up, each with why.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(|(_, reason)| reason.as_str()).collect::<Vec<_>>().join("; "))]
pub(crate) struct Missing(pub(crate) Vec<(Wall, String)>);

/// How much more than others a child deserves to be ended when the machine runs out of memory.
const OOM_SCORE: &str = "500";

/// The interface of Landlock that counts as the whole wall: files and TCP. Signals and abstract sockets came with the
/// sixth; before that the list of system calls alone keeps them.
const LANDLOCK_NEEDED: ABI = ABI::V4;
/// The newest that is asked for.
const LANDLOCK_KNOWN: ABI = ABI::V10;

/// What can be done before anybody has spoken to this process: it belongs to its primary, and has nothing else.
///
/// # Errors
/// When the system refuses, which it does for none of these.
pub(super) fn begin() -> io::Result<()> {
    // First: from here on this process dies with its parent, whatever it is doing. Should the parent be gone already,
    // nobody sends the hello, which also names the parent, so that one that was inherited from is noticed.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // What the program that started us forgot to close. The socket is 0; 1 and 2 lead nowhere.
    super::child::close_from(3)?;
    // No terminal: whoever shares one can type into it for others.
    rustix::process::setsid()?;
    // No program that it might start has more rights; also what an unprivileged process must give up for the rest.
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

impl Jail {
    /// Enters the jail. `prepare` is called when what it spends is bounded and before the doors are closed: it is for
    /// what needs files, or memory that can be executed, and it must not start threads or read a guest's bytes.
    ///
    /// Answers which walls are missing, when the child may go on without.
    ///
    /// # Errors
    /// The missing walls, when it may not.
    pub(crate) fn enter<T>(&self, prepare: impl FnOnce() -> T) -> Result<(T, Missing), Missing> {
        let mut missing = Missing::default();

        // Bounds first, so that they hold for all that follows.
        self.bound();
        // When the system runs out of memory, workers go first: they can be replaced.
        let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);

        // What is asked of the kernel once and kept: later the question would be refused.
        let _ = rustix::param::page_size();
        // The engine and its code: opened by name, mapped executable. Neither is possible any more afterwards.
        let prepared = prepare();

        // There, nobody has the user's other processes, and so threads can be counted.
        if self.namespaces && super::child::enter_namespaces(self.ports.is_empty()).is_ok() {
            bound_threads(self.threads.into());
        }
        // Root is a name only. Before the filter, which would refuse it.
        if !self.without.contains(&Wall::Privileges)
            && let Err(error) = self.drop_capabilities()
        {
            missing.0.push((Wall::Privileges, format!("what root may do could not be given up: {error}")));
        }
        // Landlock before seccomp, whose list has no place for Landlock's calls.
        if !self.without.contains(&Wall::Landlock)
            && let Err(reason) = self.restrict_files()
        {
            missing.0.push((Wall::Landlock, reason));
        }
        // Last: from here on only what a worker needs.
        if !self.without.contains(&Wall::Seccomp)
            && let Err(reason) = self.filter().load()
        {
            missing.0.push((Wall::Seccomp, reason));
        }

        if self.required && !missing.0.is_empty() { Err(missing) } else { Ok((prepared, missing)) }
    }

    /// Sets what the process may spend. A bound that is tighter already stays as it is.
    fn bound(&self) {
        let Bounds { cpu, files, file_size, data } = self.bounds;
        let set = |resource, soft: u64, hard: u64| {
            let maximum = rustix::process::getrlimit(resource).maximum;
            let within = |bound: u64| Some(maximum.map_or(bound, |maximum| maximum.min(bound)));
            // lowering one's own bound is never refused
            let _ = setrlimit(resource, Rlimit { current: within(soft), maximum: within(hard) });
        };
        if let Some(cpu) = cpu {
            // the first is a signal that says why, the second one that nothing survives
            set(Resource::Cpu, cpu.as_secs().max(1), cpu.as_secs().max(1) + 1);
        }
        set(Resource::Nofile, files, files);
        // a file that is too large is an error for whoever writes it, not the end of the process
        super::child::ignore_file_size_signal();
        set(Resource::Fsize, file_size.0, file_size.0);
        // what is in memory is nobody's business
        set(Resource::Core, 0, 0);
        set(Resource::Data, data.0, data.0);
    }

    /// Gives up all that root may do, but for what a user may expect of root in a folder that was granted.
    fn drop_capabilities(&self) -> rustix::io::Result<()> {
        let kept = if self.dirs.is_empty() {
            CapabilitySet::empty()
        } else {
            CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH | CapabilitySet::FOWNER | CapabilitySet::CHOWN
        };
        let kept = rustix::thread::capabilities(None)?.permitted & kept;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets)
    }

    /// Lets Landlock deny all files but the granted folders, all ports but those to connect to, and signals and abstract
    /// sockets of others.
    fn restrict_files(&self) -> Result<(), String> {
        let known = LANDLOCK_KNOWN;
        let restricted = Ruleset::default()
            .handle_access(AccessFs::from_all(known))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(known)))
            .and_then(|rules| rules.scope(Scope::from_all(known)))
            .and_then(Ruleset::create)
            .and_then(|rules| {
                let granted = self.dirs.iter().filter_map(|dir| {
                    // one that is gone by now is found missing where it is used
                    Some(Ok(PathBeneath::new(PathFd::new(&dir.host).ok()?, access_to(dir))))
                });
                rules.add_rules(granted)
            })
            .and_then(|rules| {
                let ports = self.ports.iter().map(|port| NetPort::new(*port, AccessNet::ConnectTcp));
                rules.add_rules(ports.map(Ok::<_, RulesetError>))
            })
            .and_then(landlock::RulesetCreated::restrict_self);
        let status = restricted.map_err(|error| format!("Landlock refused its rules: {error}"))?;
        match (status.ruleset, status.landlock) {
            (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
                Err("Landlock is not enabled in this kernel (boot it with `lsm=landlock,…`)".into())
            }
            (RulesetStatus::NotEnforced, _) => Err("this kernel has no Landlock (Linux 6.7 and later do)".into()),
            (_, LandlockStatus::Available { effective_abi, .. }) if effective_abi < LANDLOCK_NEEDED => Err(format!(
                "this kernel's Landlock knows no rules for ports (it is {effective_abi:?}, Linux 6.7 has {LANDLOCK_NEEDED:?})"
            )),
            _ => Ok(()),
        }
    }

    fn filter(&self) -> Filter {
        Filter {
            files: match self.dirs.iter().map(|dir| dir.read_only).min() {
                None => Files::None,
                Some(true) => Files::Read,
                Some(false) => Files::Change,
            },
            connects: !self.ports.is_empty(),
            threads: self.threads > 0,
            purpose: self.purpose,
        }
    }
}

/// Bounds the threads of a user who has one process: more than wrun starts anywhere, and far less than a system has room
/// for. The kernel does not hold root to it.
fn bound_threads(guests: u64) {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let bound = Some(THREADS + cores + guests);
    let _ = setrlimit(Resource::Nproc, Rlimit { current: bound, maximum: bound });
}

/// Threads that a process may have beside one for each core and those of its guest.
pub(crate) const THREADS: u64 = 64;

/// What may be done in a granted folder: all that WASI has, and neither run programs nor make devices or sockets.
fn access_to(dir: &DirGrant) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    if dir.read_only {
        return read;
    }
    let write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSym
        | AccessFs::Refer;
    read | write
}
