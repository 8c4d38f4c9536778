//! Which system calls a child may make: a short list, and what happens to one that makes others.
//!
//! What is on no list is refused with `EPERM`, since a library may try something that it can do without. What no part of
//! wrun ever does (run a program, trace, mount, load code into the kernel) ends the process at once with `SIGSYS`: only
//! somebody else's code does that. Built with the feature `strict-filter`, every other call ends it: so tests see that
//! nothing is refused that is needed.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::jail::Purpose;

/// What a child's calls depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filter {
    /// What can be done with files, as WASI does it.
    pub(super) files: Files,
    /// Whether it makes TCP connections. To where, Landlock and the engine decide.
    pub(super) connects: bool,
    /// Whether its threads choose their cores.
    pub(super) threads: bool,
    /// What the child is for.
    pub(super) purpose: Purpose,
}

/// What can be done with files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Files {
    /// None can be opened.
    None,
    /// They can be opened and read.
    Read,
    /// They can be made, written and removed, too.
    Change,
}

/// Needed by every child: memory, threads, time, and speaking on what is open.
const ALWAYS: &[c_long] = &[
    // what is open
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    // memory
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // threads
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // signals: traps are signals, and so is an abort
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // time and chance
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
];

/// Their older forms, which other architectures do not have.
#[cfg(target_arch = "x86_64")]
const ALWAYS_OLD: &[c_long] = &[libc::SYS_poll, libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const ALWAYS_OLD: &[c_long] = &[];

/// For a guest with a folder. Which files, Landlock and the engine decide.
const READS: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_getdents64,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_fadvise64,
    libc::SYS_dup,
];

/// For a guest with a folder that it may change.
const WRITES: &[c_long] = &[
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_utimensat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
];

/// For a worker with a port.
const ACCEPTS: &[c_long] = &[libc::SYS_accept4, libc::SYS_getpeername, libc::SYS_getsockname];

/// For a guest with a grant of the network.
const CONNECTS: &[c_long] = &[libc::SYS_connect, libc::SYS_getpeername, libc::SYS_getsockname];

/// What is set or asked of a socket: by those who make connections, and by guests for theirs.
const SOCKET_OPTIONS: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_RCVBUF),
    (libc::SOL_SOCKET, libc::SO_SNDBUF),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
];

/// What ends the process.
const FATAL: &[c_long] = &[
    // other programs, and other processes
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // another view of the system
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_unshare,
    libc::SYS_setns,
    // the kernel's large and young parts
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // the kernel itself
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
];

/// What a thread is made with; a process, or a namespace, is not.
const THREAD: i32 = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

/// The signal by which the C library tells all threads of a change of user, and asks for at the first of them.
const SIGNAL_OF_THREADS: i32 = 33;

/// `PAGEMAP_SCAN`, by which the engine finds what a guest has written.
const PAGEMAP_SCAN: u64 = 0xc060_6610;

impl Filter {
    /// Puts it before all further calls of this thread and of those that it starts.
    ///
    /// # Errors
    /// Says why, when the system has no such filters.
    pub(super) fn load(self) -> Result<(), String> {
        let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(|error| format!("{error}"))?;
        let program = self.program(arch).map_err(|error| format!("the filter of system calls is wrong: {error}"))?;
        seccompiler::apply_filter(&program)
            .map_err(|error| format!("this kernel takes no filter of system calls (seccomp): {error}"))
    }

    /// One program for all answers: the kernel takes its time for each that is loaded.
    fn program(self, arch: TargetArch) -> Result<BpfProgram, BackendError> {
        let mut program = answer(FATAL, &SeccompAction::KillProcess);
        // Its flags lie in memory, where a filter cannot see them. Told that there is no such call, the C library takes the
        // older one.
        program.extend(answer(&[libc::SYS_clone3], &SeccompAction::Errno(libc::ENOSYS.cast_unsigned())));
        let refused = if cfg!(feature = "strict-filter") {
            SeccompAction::KillProcess
        } else {
            SeccompAction::Errno(libc::EPERM.cast_unsigned())
        };
        let list: BpfProgram = SeccompFilter::new(self.allowed(), refused, SeccompAction::Allow, arch)?.try_into()?;
        program.extend(list);
        Ok(program)
    }

    /// The list. A call without rules is allowed whatever its arguments are, else one of the rules must fit.
    fn allowed(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        let mut list: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut allow = |calls: &[c_long]| list.extend(calls.iter().map(|call| (*call, vec![])));
        allow(ALWAYS);
        allow(ALWAYS_OLD);
        if self.files != Files::None {
            allow(READS);
        }
        if self.files == Files::Change {
            allow(WRITES);
        }
        let accepts = matches!(self.purpose, Purpose::Port | Purpose::Router);
        if accepts {
            allow(ACCEPTS);
        }
        let executable = libc::PROT_EXEC.cast_unsigned().into();
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            // code was mapped before
            let rules =
                if self.purpose == Purpose::Compiler { vec![] } else { vec![rule(&[masked(2, executable, 0)])] };
            list.insert(call, rules);
        }
        let thread = u64::from(THREAD.cast_unsigned());
        list.insert(libc::SYS_clone, vec![rule(&[masked(0, thread, thread)])]);
        // an abort signals its own thread, and nobody else
        let own = u64::from(std::process::id());
        list.insert(libc::SYS_tgkill, vec![rule(&[equal(0, own)])]);
        // asking how a signal is handled, what an abort sets, and what the first thread sets
        let may_set = [libc::SIGABRT, SIGNAL_OF_THREADS].map(|signal| rule(&[equal(0, signal.cast_unsigned().into())]));
        list.insert(libc::SYS_rt_sigaction, may_set.into_iter().chain([rule(&[is_null(1)])]).collect());
        if self.threads {
            // of the calling thread
            list.insert(libc::SYS_sched_setaffinity, vec![rule(&[equal(0, 0)])]);
        }
        // asking for one's own bounds
        list.insert(libc::SYS_prlimit64, vec![rule(&[equal(0, 0), is_null(2)])]);
        list.insert(libc::SYS_prctl, vec![rule(&[equal(0, libc::PR_SET_NAME.cast_unsigned().into())])]);
        // the last two ask whether something is a terminal
        let requests = [PAGEMAP_SCAN, libc::FIONBIO, libc::TCGETS, libc::TIOCGWINSZ];
        list.insert(libc::SYS_ioctl, requests.map(|request| rule(&[equal(1, request)])).into());
        // the last one asks whether a buffer that came can still change
        let commands =
            [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC, libc::F_GET_SEALS];
        list.insert(libc::SYS_fcntl, commands.map(|command| rule(&[equal(1, command.cast_unsigned().into())])).into());
        let option = |(level, name): (i32, i32)| {
            rule(&[equal(1, level.cast_unsigned().into()), equal(2, name.cast_unsigned().into())])
        };
        let (mut set, mut asked) = (vec![], vec![]);
        if self.purpose == Purpose::Router {
            // both ends of it are its own
            let unix = libc::AF_UNIX.cast_unsigned().into();
            list.insert(libc::SYS_socketpair, vec![rule(&[equal(0, unix)])]);
        }
        if accepts {
            set.push(option((libc::IPPROTO_TCP, libc::TCP_NODELAY)));
            asked.push(option((libc::SOL_SOCKET, libc::SO_ERROR)));
        }
        if self.connects {
            list.extend(CONNECTS.iter().map(|call| (*call, vec![])));
            list.insert(libc::SYS_socket, tcp_sockets());
            // it would connect on a way that Landlock does not know
            let fast_open = libc::MSG_FASTOPEN.cast_unsigned().into();
            list.insert(libc::SYS_sendto, vec![rule(&[masked(3, fast_open, 0)])]);
            list.insert(libc::SYS_sendmsg, vec![rule(&[masked(2, fast_open, 0)])]);
            set = SOCKET_OPTIONS.iter().copied().map(option).collect();
            asked = SOCKET_OPTIONS.iter().copied().chain([(libc::SOL_SOCKET, libc::SO_ERROR)]).map(option).collect();
        }
        if !set.is_empty() {
            list.insert(libc::SYS_setsockopt, set);
            list.insert(libc::SYS_getsockopt, asked);
        }
        list
    }
}

/// Sockets of TCP, and of no other protocol that has streams: Landlock does not know those.
fn tcp_sockets() -> Vec<SeccompRule> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let kind = u64::from((!flags).cast_unsigned());
    let stream = u64::from(libc::SOCK_STREAM.cast_unsigned());
    let of = |family: i32, protocol: i32| {
        let (family, protocol) = (family.cast_unsigned().into(), protocol.cast_unsigned().into());
        rule(&[equal(0, family), masked(1, kind, stream), equal(2, protocol)])
    };
    [libc::AF_INET, libc::AF_INET6]
        .into_iter()
        .flat_map(|family| [of(family, 0), of(family, libc::IPPROTO_TCP)])
        .collect()
}

/// The part of a program that answers these calls and goes on with all others.
fn answer(calls: &[c_long], action: &SeccompAction) -> BpfProgram {
    let statement = |code: u32, value: u32| {
        let code = u16::try_from(code).expect("codes are below 256");
        sock_filter { code, jt: 0, jf: 0, k: value }
    };
    let is_one = |(at, call): (usize, &c_long)| sock_filter {
        // past those that follow, and the way on
        jt: u8::try_from(calls.len() - at).expect("a short list"),
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::try_from(*call).expect("a number of a call"))
    };
    // the number of the call
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    program.extend(calls.iter().enumerate().map(is_one));
    program.push(statement(libc::BPF_JMP | libc::BPF_JA, 1));
    program.push(statement(libc::BPF_RET | libc::BPF_K, action.clone().into()));
    program
}

fn rule(conditions: &[SeccompCondition]) -> SeccompRule {
    SeccompRule::new(conditions.to_vec()).expect("there is a condition")
}

fn condition(argument: u8, length: SeccompCmpArgLen, operator: SeccompCmpOp, value: u64) -> SeccompCondition {
    SeccompCondition::new(argument, length, operator, value).expect("a call has six arguments")
}

/// A number, of which the kernel sees the low half.
fn equal(argument: u8, value: u64) -> SeccompCondition {
    condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// Flags.
fn masked(argument: u8, mask: u64, value: u64) -> SeccompCondition {
    condition(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value)
}

/// A pointer.
fn is_null(argument: u8) -> SeccompCondition {
    condition(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}
