//! What a worker's guests reach of the network: who decides about addresses, knows where names led, and tells what was
//! refused.

use std::{
    collections::VecDeque,
    fmt, io,
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream as StdStream,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::{io::AsyncReadExt, net::UnixStream};

use super::tls::{Roots, Tls};
use crate::grant::{Denied, Grants, REFUSALS_MAX, Target, default_port, host_and_port};

/// The network of all instances of one worker.
pub(crate) struct Network {
    grants: Grants,
    names: Option<Names>,
    /// Which name led to which address, the oldest first.
    led: Mutex<VecDeque<(String, IpAddr)>>,
    tls: Option<Tls>,
    /// The grants that were said to be missing.
    told: Mutex<Vec<String>>,
    tell: Box<dyn Fn(Denied) + Send + Sync>,
}

/// How many pairs of a name and an address are kept.
const LED_MAX: usize = 1024;

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").finish_non_exhaustive()
    }
}

impl Default for Network {
    /// Nothing is granted, and nobody hears of it.
    fn default() -> Self {
        Self::prepare(&Grants::default(), None, &Roots::default(), |_| {})
    }
}

impl Network {
    /// Makes it, before files can no longer be opened. `names` is the line to who looks names up; `tell` hears what was
    /// refused, each grant once and not without end.
    pub(crate) fn prepare(
        grants: &Grants,
        names: Option<StdStream>,
        roots: &Roots,
        tell: impl Fn(Denied) + Send + Sync + 'static,
    ) -> Self {
        let (http, tcp) = (grants.http.clone(), grants.tcp.clone());
        Self {
            tls: (!http.is_empty()).then(|| Tls::prepare(roots)),
            grants: Grants { http, tcp, ..Grants::default() },
            names: names.map(Names::new),
            led: Mutex::default(),
            told: Mutex::default(),
            tell: Box::new(tell),
        }
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Tells that no TCP connection may be made, wherever it would have gone to.
    pub(super) fn refuse_tcp(&self) {
        self.refuse("--tcp HOST:PORT".into(), "the guest may not open TCP connections".into());
    }

    /// Whether a TCP connection to this address may be made.
    pub(in crate::sandbox) fn check_tcp(&self, address: SocketAddr) -> bool {
        let led = lock(&self.led);
        let led_to = |name: &str, ip: IpAddr| led.iter().any(|(from, to)| from == name && *to == ip);
        let allowed = self.grants.allow_tcp(address, led_to);
        drop(led);
        if !allowed {
            let to = host_and_port(&address.ip().to_canonical(), Some(address.port()));
            self.refuse(format!("--tcp {to}"), format!("the guest may not connect to {to}"));
        }
        allowed
    }

    /// Whether this name may be looked up.
    pub(super) fn check_lookup(&self, name: &str) -> bool {
        let allowed = self.grants.allow_lookup(name);
        if !allowed {
            self.refuse(format!("--tcp {name}:PORT"), format!("the guest may not look up {name}"));
        }
        allowed
    }

    /// Whether requests to this host may be made at all.
    pub(super) fn check_http(&self, target: &Target, https: bool, port: u16) -> bool {
        let allowed = self.grants.allow_http(target, https, port);
        if !allowed {
            let reason = format!("the guest may not send requests to {}", host_and_port(target, Some(port)));
            self.refuse(http_grant(target, https, port), reason);
        }
        allowed
    }

    /// Of the addresses that a granted name led to, those that a request may go to.
    pub(super) fn allowed_of(&self, name: &str, found: &[IpAddr], https: bool, port: u16) -> Vec<IpAddr> {
        let allowed = |ip: &&IpAddr| self.grants.allow_http_at(**ip, https, port);
        let allowed: Vec<IpAddr> = found.iter().filter(allowed).copied().collect();
        if let (Some(first), true) = (found.first(), allowed.is_empty()) {
            let to = host_and_port(first, Some(port));
            let reason = format!("the guest may not send requests to {to}, a private address that {name} leads to");
            self.refuse(http_grant(&Target::Address(*first), https, port), reason);
        }
        allowed
    }

    /// Where a granted name leads; nowhere when nobody knows. It must have been checked.
    pub(super) async fn look_up(&self, name: &str) -> Vec<IpAddr> {
        let Some(names) = &self.names else { return vec![] };
        // who answers has gone: so has the primary, or it does not like what it was asked
        let found = names.ask(name).await.unwrap_or_default();
        let found: Vec<IpAddr> = found.into_iter().map(|ip| ip.to_canonical()).collect();
        let mut led = lock(&self.led);
        for ip in &found {
            led.retain(|(from, to)| from != name || to != ip);
            led.push_back((name.to_owned(), *ip));
        }
        let surplus = led.len().saturating_sub(LED_MAX);
        led.drain(..surplus);
        found
    }

    fn refuse(&self, grant: String, reason: String) {
        let mut told = lock(&self.told);
        if told.len() >= REFUSALS_MAX || told.contains(&grant) {
            return;
        }
        told.push(grant.clone());
        drop(told);
        (self.tell)(Denied { grant, reason });
    }
}

/// The shortest grant of such requests.
fn http_grant(target: &Target, https: bool, port: u16) -> String {
    format!("--http {}", host_and_port(target, Some(port).filter(|port| *port != default_port(https))))
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // what is kept is whole after every use, whoever panicked
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The worker's end of the line to who looks names up.
struct Names(tokio::sync::Mutex<Line>);

/// Whoever asks may stop to wait at any moment: what was not sent yet, and what came for somebody who has gone, stays.
struct Line {
    socket: Result<UnixStream, Option<StdStream>>,
    asked: u64,
    answered: u64,
    unsent: Vec<u8>,
    came: Vec<u8>,
}

impl Names {
    fn new(socket: StdStream) -> Self {
        Self(tokio::sync::Mutex::new(Line {
            socket: Err(Some(socket)),
            asked: 0,
            answered: 0,
            unsent: vec![],
            came: vec![],
        }))
    }

    async fn ask(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let mut line = self.0.lock().await;
        let Line { socket, asked, answered, unsent, came } = &mut *line;
        if let Err(bare) = socket {
            let bare = bare.take().ok_or(io::ErrorKind::NotConnected)?;
            bare.set_nonblocking(true)?;
            // only now there is a runtime that it belongs to
            *socket = Ok(UnixStream::from_std(bare)?);
        }
        let Ok(socket) = socket else { return Err(io::ErrorKind::NotConnected.into()) };
        // what those have left who did not wait, first: never more than one line is unsent, or unanswered
        write_all(socket, unsent).await?;
        while *answered < *asked {
            read_answer(socket, came, answered).await?;
        }
        *asked += 1;
        unsent.extend_from_slice(format!("{asked} {name}\n").as_bytes());
        write_all(socket, unsent).await?;
        read_answer(socket, came, answered).await
    }
}

async fn write_all(socket: &UnixStream, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        socket.writable().await?;
        match socket.try_write(unsent) {
            Ok(count) => drop(unsent.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The next answer, and whose it is.
async fn read_answer(socket: &mut UnixStream, came: &mut Vec<u8>, answered: &mut u64) -> io::Result<Vec<IpAddr>> {
    loop {
        if let Some(end) = came.iter().position(|byte| *byte == b'\n') {
            let answer: Vec<u8> = came.drain(..=end).collect();
            let answer = String::from_utf8_lossy(&answer);
            let mut fields = answer.split_ascii_whitespace();
            *answered = fields.next().and_then(|id| id.parse().ok()).unwrap_or(*answered);
            return Ok(fields.filter_map(|field| field.parse().ok()).collect());
        }
        if socket.read_buf(came).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A network with these grants, and all that it tells.
    fn network(http: &[&str], tcp: &[&str], names: Option<StdStream>) -> (Network, Arc<Mutex<Vec<String>>>) {
        let grants = Grants {
            http: http.iter().map(|text| text.parse().expect(text)).collect(),
            tcp: tcp.iter().map(|text| text.parse().expect(text)).collect(),
            ..Grants::default()
        };
        let told = Arc::<Mutex<Vec<String>>>::default();
        let theirs = told.clone();
        let network = Network::prepare(&grants, names, &Roots::default(), move |denied| {
            lock(&theirs).push(denied.to_string());
        });
        (network, told)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
    }

    /// Reads one request and sends this instead of its end.
    async fn answer(socket: &mut UnixStream, answer: &str) {
        let mut came = vec![];
        while !came.ends_with(b"\n") {
            socket.read_buf(&mut came).await.expect("a request");
        }
        let id = String::from_utf8(came).expect("text").split_once(' ').expect("an id").0.to_owned();
        socket.write_all(format!("{id} {answer}\n").as_bytes()).await.expect("it is there");
    }

    #[test]
    fn names_lead_where_they_were_looked_up_to_and_to_nothing_private() {
        block_on(async {
            let (ours, theirs) = StdStream::pair().expect("sockets");
            theirs.set_nonblocking(true).expect("a socket");
            let mut theirs = UnixStream::from_std(theirs).expect("a socket");
            let (network, told) = network(&["b.example"], &["a.example:80"], Some(ours));
            let to = |text: &str| network.check_tcp(text.parse().expect(text));

            assert!(!to("8.8.8.8:80"));
            let addresses = "8.8.8.8 127.0.0.1 ::ffff:9.9.9.9";
            let (found, ()) = tokio::join!(network.look_up("a.example"), answer(&mut theirs, addresses));
            assert_eq!(found.len(), 3);
            assert!(to("8.8.8.8:80") && to("9.9.9.9:80"));
            // whoever owns the name let it lead here
            assert!(!to("127.0.0.1:80") && !to("8.8.8.8:81"));

            // where another name led, which is granted for something else
            let (found, ()) =
                tokio::join!(network.look_up("b.example"), answer(&mut theirs, "1.1.1.1 169.254.169.254"));
            assert!(!to("1.1.1.1:80"));
            assert_eq!(network.allowed_of("b.example", &found, true, 443), [IpAddr::from([1, 1, 1, 1])]);
            assert!(network.allowed_of("b.example", &found[1..], true, 443).is_empty());
            let told = lock(&told).clone();
            assert_eq!(told[0], "the guest may not connect to 8.8.8.8:80; `--tcp 8.8.8.8:80` would allow it");
            assert_eq!(
                told.last().expect("some"),
                "the guest may not send requests to 169.254.169.254:443, a private address that b.example leads to; \
                 `--http 169.254.169.254` would allow it"
            );
        });
    }

    #[test]
    fn an_answer_reaches_who_asked_whoever_has_gone() {
        block_on(async {
            let (ours, theirs) = StdStream::pair().expect("sockets");
            theirs.set_nonblocking(true).expect("a socket");
            let mut theirs = UnixStream::from_std(theirs).expect("a socket");
            let (network, _) = network(&[], &["a.example:80", "b.example:80"], Some(ours));
            // the first goes when it has asked
            tokio::select! {
                biased;
                _ = network.look_up("a.example") => panic!("nobody has answered"),
                () = std::future::ready(()) => {}
            }
            let answers = theirs.write_all(b"1 1.1.1.1\n2 2.2.2.2\n");
            let (found, sent) = tokio::join!(network.look_up("b.example"), answers);
            sent.expect("it is there");
            assert_eq!(found, [IpAddr::from([2, 2, 2, 2])]);
        });
    }

    #[test]
    fn each_refusal_is_told_once_and_not_without_end() {
        let (network, told) = network(&[], &[], None);
        for _ in 0..2 {
            assert!(!network.check_tcp("[::1]:5432".parse().expect("an address")));
            assert!(!network.check_lookup("a.example"));
            assert!(!network.check_http(&Target::Name("a.example".into()), true, 443));
            assert!(!network.check_http(&Target::Name("a.example".into()), false, 443));
        }
        let expected = ["--tcp [::1]:5432", "--tcp a.example:PORT", "--http a.example", "--http a.example:443"];
        let first = lock(&told).clone();
        assert_eq!(first.len(), expected.len());
        for (told, grant) in first.iter().zip(expected) {
            assert!(told.ends_with(&format!("; `{grant}` would allow it")), "{told}");
        }
        for port in 1..1000 {
            assert!(!network.check_tcp(SocketAddr::from(([127, 0, 0, 1], port))));
        }
        assert_eq!(lock(&told).len(), REFUSALS_MAX);
    }

    #[test]
    fn what_is_suggested_would_allow_it() {
        for (text, https, port) in
            [("127.0.0.1", false, 80), ("::1", true, 8443), ("::1", true, 443), ("a.example", false, 443)]
        {
            let target = Target::parse(text).expect(text);
            let grant = http_grant(&target, https, port);
            let (network, _) = network(&[grant.strip_prefix("--http ").expect("a flag")], &[], None);
            assert!(network.check_http(&target, https, port), "{grant}");
        }
    }
}
