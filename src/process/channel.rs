//! A channel by which a router hands connections to the workers of an app.
//!
//! It is used as a listener is: all workers wait at one end, and whoever is first takes the next connection; those that
//! nobody has taken yet outlive the workers. But nobody can connect to it who was not given the other end, it has no name
//! in any file system, and a router needs no permission to connect to anything: it makes a pair of sockets and sends one.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};

/// How much may wait in it: a thousand connections and more.
const WAITING: usize = 1 << 20;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A new one: the router's end, and that of the workers.
///
/// # Errors
/// When the system has no descriptor left.
pub(crate) fn new() -> io::Result<(OwnedFd, OwnedFd)> {
    let (router, workers) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    // more than the system allows is cut to what it allows
    let _ = sockopt::set_socket_send_buffer_size(&router, WAITING);
    Ok((router, workers))
}

/// Makes a connection, and hands one end to whoever takes it. The other end.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when as many wait as may; else as the system says.
pub(crate) fn connect(channel: impl AsFd) -> io::Result<OwnedFd> {
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    let fds = [theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(channel, &[io::IoSlice::new(b"c")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(ours)
}

/// Takes the next connection.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when none waits; else as the system says.
pub(crate) fn receive(channel: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(channel, &mut [io::IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    // the descriptor is lost when there is no room for another one
    fds.last().ok_or_else(|| rustix::io::Errno::MFILE.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_goes_to_one_and_waits_for_it() {
        let (router, workers) = new().expect("a pair");
        let others = workers.try_clone().expect("a descriptor");
        let ours = connect(&router).expect("room");
        let theirs = receive(&others).expect("it waits");
        assert_eq!(receive(&workers).expect_err("taken").kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&ours, b"hello").expect("room");
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::read(&theirs, &mut bytes), Ok(5));
        // nobody takes them: at some time there is no more room, and nobody waits for it
        let mut waiting = vec![];
        let end = loop {
            match connect(&router) {
                Ok(connection) => waiting.push(connection),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100_000, "there is a bound");
        };
        assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
        let first = receive(&workers).expect("it waits");
        rustix::io::write(&waiting[0], b"first").expect("room");
        assert_eq!(rustix::io::read(&first, &mut bytes), Ok(5), "in order");
    }
}
