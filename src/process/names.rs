//! Names that workers ask for: a jail has no DNS, so the primary looks them up.
//!
//! | to the primary | from it |
//! | --- | --- |
//! | `ID NAME` and a line's end | `ID ADDRESS ADDRESS …` and a line's end; no address when there is none |
//!
//! Each worker has a line of its own, which ends with it, and one lookup at a time. The worker believes the answers; the
//! primary believes the worker nothing, and asks for no name that is not granted.

use std::{
    future::Future,
    io,
    net::{IpAddr, ToSocketAddrs},
    os::unix::net::UnixStream as StdStream,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
};

use crate::grant::{Grants, NAME_MAX, Target};

/// The longest line of a worker, in bytes: a name, and what is around it.
const LINE_MAX: usize = NAME_MAX + 32;

/// How many addresses of a name are told.
const ADDRESSES_MAX: usize = 16;

/// Begins to answer a worker that is to be started: its end of the line, when there is a name in its grants. Must be
/// called inside of a runtime, which must go on.
///
/// # Errors
/// When the system has no descriptor left.
pub(crate) fn answer(grants: &Grants) -> io::Result<Option<StdStream>> {
    if !grants.have_names() {
        return Ok(None);
    }
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    tokio::spawn(answer_with(UnixStream::from_std(ours)?, grants.clone(), look_up));
    Ok(Some(theirs))
}

/// Answers until the other end is closed, or sends what is no request.
async fn answer_with<L: Future<Output = Vec<IpAddr>>>(
    mut socket: UnixStream,
    grants: Grants,
    look_up: impl Fn(String) -> L,
) {
    let mut came = Vec::with_capacity(LINE_MAX);
    loop {
        let Some(end) = came.iter().position(|byte| *byte == b'\n') else {
            if came.len() > LINE_MAX || !matches!(socket.read_buf(&mut came).await, Ok(1..)) {
                return;
            }
            continue;
        };
        let line: Vec<u8> = came.drain(..=end).collect();
        let request = std::str::from_utf8(&line[..end]).ok().and_then(|line| line.split_once(' '));
        let Some((id, name)) = request.and_then(|(id, name)| Some((id.parse::<u64>().ok()?, name))) else { return };
        // the same reading as in the worker, whatever that has made of it
        let addresses = match Target::parse(name) {
            Some(Target::Name(name)) if grants.allow_lookup(&name) => look_up(name).await,
            _ => vec![],
        };
        let mut answer = id.to_string();
        for address in addresses.into_iter().take(ADDRESSES_MAX) {
            answer += " ";
            answer += &address.to_string();
        }
        answer += "\n";
        if socket.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// The addresses of a name, by the system's own ways: its files, its DNS.
///
/// On a thread of its own, which nobody waits for: a runtime would wait at its end for those that it lends.
async fn look_up(name: String) -> Vec<IpAddr> {
    let (told, answer) = oneshot::channel();
    let asked = std::thread::Builder::new().name("wrun-lookup".into()).spawn(move || {
        let found = (name.as_str(), 0).to_socket_addrs();
        let mut addresses: Vec<IpAddr> = found.into_iter().flatten().map(|address| address.ip()).collect();
        addresses.dedup();
        // nobody may be waiting any more
        let _ = told.send(addresses);
    });
    if asked.is_err() {
        return vec![];
    }
    answer.await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the primary says to these bytes when every name leads to two addresses.
    fn answers(sent: &[u8]) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (mut worker, primary) = UnixStream::pair().expect("sockets");
            let grants = Grants { tcp: vec!["a.example:1".parse().expect("a grant")], ..Grants::default() };
            let answering = tokio::spawn(answer_with(primary, grants, |name| async move {
                assert_eq!(name, "a.example");
                vec![IpAddr::from([1, 2, 3, 4]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]
            }));
            worker.write_all(sent).await.expect("it is there");
            worker.shutdown().await.expect("it is there");
            let mut came = String::new();
            // one that refuses to go on may do so with bytes unread, which counts for an end
            let _ = worker.read_to_string(&mut came).await;
            answering.await.expect("it does not panic");
            came
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
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let told = runtime.block_on(async {
            let (mut worker, primary) = UnixStream::pair().expect("sockets");
            let grants = Grants { tcp: vec!["a.example:1".parse().expect("a grant")], ..Grants::default() };
            tokio::spawn(answer_with(primary, grants, |_| async { vec![IpAddr::from([1, 2, 3, 4]); 1000] }));
            worker.write_all(b"1 a.example\n").await.expect("it is there");
            worker.shutdown().await.expect("it is there");
            let mut came = String::new();
            worker.read_to_string(&mut came).await.expect("an answer");
            came
        });
        assert_eq!(told.matches("1.2.3.4").count(), ADDRESSES_MAX);
    }
}
