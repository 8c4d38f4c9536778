//! Names that workers ask for: a jail has no DNS, so the primary looks them up.
//!
//! | to the primary | from it |
//! | --- | --- |
//! | `ID NAME` and a line's end | `ID ADDRESS ADDRESS …` and a line's end; no address when there is none |
//!
//! Each worker has a line of its own, which ends with it, and one lookup at a time. The worker believes the answers; the
//! primary believes the worker nothing, and asks for no name that is not granted.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, ToSocketAddrs},
    os::unix::net::UnixStream,
};

use crate::grant::{Grants, NAME_MAX, Target};

/// The longest line of a worker, in bytes: a name, and what is around it.
const LINE_MAX: usize = NAME_MAX + 32;

/// How many addresses of a name are told.
const ADDRESSES_MAX: usize = 16;

/// Begins to answer a worker that is to be started, on a thread of its own: its end of the line, when there is a name in
/// its grants.
///
/// # Errors
/// When the system has no descriptor or no room for a thread left.
pub(crate) fn answer(grants: &Grants) -> io::Result<Option<UnixStream>> {
    if !grants.have_names() {
        return Ok(None);
    }
    let (ours, theirs) = UnixStream::pair()?;
    let grants = grants.clone();
    std::thread::Builder::new().name("wrun-names".into()).spawn(move || answer_with(ours, &grants, look_up))?;
    Ok(Some(theirs))
}

/// Answers until the other end is closed, or sends what is no request.
fn answer_with(mut socket: UnixStream, grants: &Grants, look_up: impl Fn(&str) -> Vec<IpAddr>) {
    let (mut came, mut chunk) = (Vec::with_capacity(LINE_MAX), [0; LINE_MAX]);
    loop {
        let Some(end) = came.iter().position(|byte| *byte == b'\n') else {
            match socket.read(&mut chunk) {
                Ok(count @ 1..) if came.len() <= LINE_MAX => came.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
            continue;
        };
        let line: Vec<u8> = came.drain(..=end).collect();
        let request = std::str::from_utf8(&line[..end]).ok().and_then(|line| line.split_once(' '));
        let Some((id, name)) = request.and_then(|(id, name)| Some((id.parse::<u64>().ok()?, name))) else { return };
        // the same reading as in the worker, whatever that has made of it
        let addresses = match Target::parse(name) {
            Some(Target::Name(name)) if grants.allow_lookup(&name) => look_up(&name),
            _ => vec![],
        };
        let mut answer = id.to_string();
        for address in addresses.into_iter().take(ADDRESSES_MAX) {
            answer += " ";
            answer += &address.to_string();
        }
        answer += "\n";
        if socket.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// The addresses of a name, by the system's own ways: its files, its DNS.
fn look_up(name: &str) -> Vec<IpAddr> {
    let found = (name, 0).to_socket_addrs();
    let mut addresses: Vec<IpAddr> = found.into_iter().flatten().map(|address| address.ip()).collect();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the primary says to these bytes, with what a name leads to.
    fn answers_with(sent: &[u8], look_up: impl Fn(&str) -> Vec<IpAddr> + Send + 'static) -> String {
        let (mut worker, primary) = UnixStream::pair().expect("sockets");
        let grants = Grants { tcp: vec!["a.example:1".parse().expect("a grant")], ..Grants::default() };
        let answering = std::thread::spawn(move || answer_with(primary, &grants, look_up));
        // one that refuses to go on may do so with bytes unread, which counts for an end
        let _ = worker.write_all(sent).and_then(|()| worker.shutdown(std::net::Shutdown::Write));
        let mut came = String::new();
        let _ = worker.read_to_string(&mut came);
        answering.join().expect("it does not panic");
        came
    }

    /// The same when every name leads to two addresses.
    fn answers(sent: &[u8]) -> String {
        answers_with(sent, |name| {
            assert_eq!(name, "a.example");
            vec![IpAddr::from([1, 2, 3, 4]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]
        })
    }

    #[test]
    fn granted_names_are_answered_and_others_are_not_asked_for() {
        assert_eq!(answers(b"1 a.example\n2 A.Example.\n"), "1 1.2.3.4 ::1\n2 1.2.3.4 ::1\n");
        assert_eq!(answers(b"1 b.example\n2 x.a.example\n3 a.example\n"), "1\n2\n3 1.2.3.4 ::1\n");
        assert_eq!(answers(b"1 1.2.3.4\n2 a.example b.example\n3 \n"), "1\n2\n3\n");
    }

    #[test]
    fn what_is_no_request_ends_the_line() {
        for sent in [&b"\n"[..], b"a.example\n", b"x a.example\n", b"1 \xff\n", b" a.example\n", b"-1 a.example\n"] {
            assert_eq!(answers(&[sent, b"1 a.example\n"].concat()), "", "{sent:?}");
        }
        assert_eq!(answers(&[&b"1 "[..], &b"a".repeat(LINE_MAX * 2), b"\n1 a.example\n"].concat()), "");
        assert_eq!(answers(b"1 a.example"), "");
    }

    #[test]
    fn so_many_addresses_are_told() {
        let told = answers_with(b"1 a.example\n", |_| vec![IpAddr::from([1, 2, 3, 4]); 1000]);
        assert_eq!(told.matches("1.2.3.4").count(), ADDRESSES_MAX);
    }
}
