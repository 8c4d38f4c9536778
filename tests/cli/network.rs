//! What a guest reaches of the network: every grant allowed beside denied, and what is said of the refused.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::Arc,
};

use guest_artifacts::{ECHO, FETCH, GATEWAY, HOSTILE, NET, NET_P1};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::ring, pki_types::PrivateKeyDer};
use serde_json::{Value, json};

use crate::{
    client::Server,
    jail::is_jailed,
    supervision::{event, pid},
    wrun::{Finished, Folder, Wrun, wrun},
};

const WAYS: [&str; 2] = ["thread", "jail"];

/// A server that lives as long as the tests do: what it does with each connection, on a thread of its own.
fn serve(address: &str, handle: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let bound = listener.local_addr().unwrap();
    let handle = Arc::new(handle);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let handle = handle.clone();
            std::thread::spawn(move || handle(stream.unwrap()));
        }
    });
    bound
}

/// One that answers a line with `got` and that line.
fn lines(address: &str) -> SocketAddr {
    serve(address, |stream| {
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        // whoever only connects has gone
        let _ = (&stream).write_all(format!("got {line}").as_bytes());
    })
}

/// One that nobody may reach: who did, waits in its queue.
struct Forbidden(TcpListener);

impl Forbidden {
    fn at(address: impl ToSocketAddrs) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    #[track_caller]
    fn was_left_alone(&self) {
        assert_eq!(self.0.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}

/// The head of a request, and how many bytes its body has.
fn request(stream: &mut impl Read) -> Option<(Vec<String>, usize)> {
    let mut reader = BufReader::new(stream);
    let mut head = vec![];
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(1..) if line != "\r\n" => head.push(line.trim_end().to_owned()),
            Ok(1..) => break,
            _ => return None,
        }
    }
    if !head.iter().any(|line| line == "transfer-encoding: chunked") {
        return Some((head, 0));
    }
    let mut bytes = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim_end(), 16).ok()?;
        reader.read_exact(&mut vec![0; size + 2]).ok()?;
        if size == 0 {
            return Some((head, bytes));
        }
        bytes += size;
    }
}

/// Answers one request as the path says.
fn answer(mut stream: impl Read + Write) {
    let Some((head, posted)) = request(&mut stream) else { return };
    let target = head[0].split(' ').nth(1).unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let whole = |status: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    let bytes = match path {
        "/to" => format!("HTTP/1.1 302 Found\r\nlocation: {query}\r\ncontent-length: 0\r\n\r\n").into_bytes(),
        "/host" => {
            let hosts: Vec<_> = head.iter().filter(|line| line.to_ascii_lowercase().starts_with("host:")).collect();
            whole("200 OK", format!("{hosts:?}").as_bytes())
        }
        "/posted" => whole("200 OK", posted.to_string().as_bytes()),
        "/large" => whole("200 OK", &vec![b'x'; query.parse().unwrap()]),
        "/short" | "/stalled" => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nx".to_vec(),
        "/nothing" => vec![],
        "/nonsense" => b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec(),
        "/endless-head" => [b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'x'; 1 << 20]].concat(),
        _ => whole("200 OK", b"hello"),
    };
    let _ = stream.write_all(&bytes);
    if path == "/stalled" {
        // until the client has had enough
        let _ = stream.read(&mut [0]);
    }
    let _ = stream.flush();
}

fn http() -> SocketAddr {
    serve("127.0.0.1:0", answer)
}

/// `wrun run` of a guest with these grants.
fn run(isolation: &str, guest: &str, grants: &[&str]) -> Wrun {
    wrun(["run", "--isolation", isolation, guest]).args(grants).args(["--"])
}

/// What is said of a refusal.
fn refused(reason: &str, grant: &str) -> String {
    format!("wrun: refused: the guest may not {reason}; `{grant}` would allow it\n")
}

/// All that is on standard error, in an order of its own: two processes write there.
trait Sorted {
    fn said(self, code: i32, stdout: &str, stderr: &[String]) -> Finished;
}

impl Sorted for Finished {
    #[track_caller]
    fn said(self, code: i32, stdout: &str, stderr: &[String]) -> Finished {
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let holds = sorted(&self.stderr_text()) == sorted(&stderr.concat());
        self.code(code).stdout(stdout).check(holds, &format!("expected on stderr, in some order: {stderr:?}"))
    }
}

const DENIED: &str = "permission denied\n";
const HTTP_DENIED: &str = "ErrorCode::HttpRequestDenied\n";

#[test]
fn tcp_goes_to_the_address_that_is_granted_and_to_no_other() {
    let granted = lines("127.0.0.1:0");
    let other_port = Forbidden::at("127.0.0.1:0");
    let other_host = Forbidden::at(("127.0.0.2", granted.port()));
    for way in WAYS {
        let grant = format!("--tcp={granted}");
        run(way, NET, &[&grant]).args(["connect", &granted.to_string()]).run().said(0, "got hello\n", &[]);
        for other in [&other_port, &other_host] {
            let address = other.address().to_string();
            let expected = [refused(&format!("connect to {address}"), &format!("--tcp {address}")), DENIED.to_owned()];
            run(way, NET, &[&grant]).args(["connect", &address]).run().said(1, "", &expected);
            other.was_left_alone();
        }
        // a grant of another kind
        let http = format!("--http={granted}");
        run(way, NET, &[&http]).args(["connect", &granted.to_string()]).run().code(1).stdout("");
        // what is suggested would have allowed it
        let address = other_host.address().to_string();
        let allowed = run(way, NET, &["--tcp", &address]).args(["hold", &address, "1"]);
        allowed.run().said(0, "1\n", &[]);
        other_host.0.accept().unwrap();
    }
}

#[test]
fn without_a_grant_a_guest_hears_no_and_you_hear_which() {
    let port = Forbidden::at("127.0.0.1:0");
    let address = port.address().to_string();
    for way in WAYS {
        // in a jail there is not even a socket that could be asked where it should go
        let expected = match way {
            "thread" => refused(&format!("connect to {address}"), &format!("--tcp {address}")),
            _ => refused("open TCP connections", "--tcp HOST:PORT"),
        };
        run(way, NET, &[]).args(["connect", &address]).run().said(1, "", &[expected, DENIED.into()]);
        let expected = refused("look up localhost", "--tcp localhost:PORT");
        run(way, NET, &[]).args(["lookup", "localhost"]).run().said(1, "", &[expected, DENIED.into()]);
        let expected = refused(&format!("send requests to {address}"), &format!("--http {address}"));
        let url = format!("http://{address}/");
        run(way, FETCH, &[]).arg(&url).run().said(1, "", &[expected, HTTP_DENIED.into()]);
        let expected = refused("send requests to example.org:443", "--http example.org");
        run(way, FETCH, &[]).arg("https://Example.org./").run().said(1, "", &[expected, HTTP_DENIED.into()]);
        // a module has no sockets at all, whatever is granted
        run(way, NET_P1, &["--tcp", &address]).args(["connect", &address]).run().said(1, "", &["unsupported\n".into()]);
    }
    port.was_left_alone();
}

#[test]
fn networks_localhost_and_ipv6_are_granted_by_what_they_are() {
    let v4 = lines("127.0.0.3:0");
    // another test may have the same port of the other address
    let (v6, beside) = std::iter::repeat_with(|| lines("[::1]:0"))
        .find_map(|v6| Some((v6, Forbidden(TcpListener::bind(("127.0.0.1", v6.port())).ok()?))))
        .unwrap();
    beside.0.set_nonblocking(true).unwrap();
    for way in WAYS {
        let connect = |grant: String, address: &SocketAddr| {
            run(way, NET, &["--tcp", &grant]).args(["connect", &address.to_string()]).run()
        };
        for host in ["127.0.0.0/8", "127.0.0.3", "localhost", "LocalHost."] {
            connect(format!("{host}:{}", v4.port()), &v4).said(0, "got hello\n", &[]);
        }
        for host in ["[::1]", "[::/64]", "localhost", "[::/0]"] {
            connect(format!("{host}:{}", v6.port()), &v6).said(0, "got hello\n", &[]);
        }
        for host in ["128.0.0.0/8", "127.0.0.4", "[::/0]", "example.org"] {
            let expected = refused(&format!("connect to {v4}"), &format!("--tcp {v4}"));
            connect(format!("{host}:{}", v4.port()), &v4).said(1, "", &[expected, DENIED.into()]);
        }
        let expected = refused(&format!("connect to {v6}"), &format!("--tcp {v6}"));
        connect(format!("127.0.0.1:{}", v6.port()), &v6).said(1, "", &[expected, DENIED.into()]);
        // an IPv4 address in another form, which WASI has no sockets for, and which is IPv4 to a request
        let mapped = format!("[::ffff:127.0.0.1]:{}", beside.address().port());
        connect(format!("[::/0]:{}", beside.address().port()), &mapped.parse().unwrap()).code(1).stdout("");
        let grant = format!("--http=[::/0]:{}", beside.address().port());
        let expected =
            refused(&format!("send requests to {}", beside.address()), &format!("--http {}", beside.address()));
        let url = format!("http://{mapped}/");
        run(way, FETCH, &[&grant]).arg(&url).run().said(1, "", &[expected, HTTP_DENIED.into()]);
    }
    beside.was_left_alone();
}

#[test]
fn names_are_looked_up_when_they_are_granted_and_no_others_are() {
    let address = lines("127.0.0.1:0");
    let grant = format!("--tcp=localhost:{}", address.port());
    for way in WAYS {
        let to_name = format!("LOCALHOST.:{}", address.port());
        run(way, NET, &[&grant]).args(["connect", &to_name, "lookup", "127.0.0.9"]).run().said(
            0,
            "got hello\n127.0.0.9\n",
            &[],
        );
        let found = run(way, NET, &[&grant]).args(["lookup", "localhost"]).run().code(0).stderr("").stdout_text();
        assert!(found.split_whitespace().all(|ip| ip.parse::<IpAddr>().unwrap().is_loopback()), "{found}");
        // a lookup alone tells somebody something
        let expected = refused("look up s3cr3t.example.org", "--tcp s3cr3t.example.org:PORT");
        run(way, NET, &[&grant]).args(["lookup", "s3cr3t.example.org"]).run().said(1, "", &[expected, DENIED.into()]);
        let expected = refused("look up sub.localhost", "--tcp sub.localhost:PORT");
        run(way, NET, &[&grant]).args(["lookup", "sub.localhost"]).run().said(1, "", &[expected, DENIED.into()]);
        // what is no name is not looked up either
        run(way, NET, &[&grant]).args(["lookup", "local host"]).run().code(1).stdout("");
        // nor is one that nobody has
        let unknown = run(way, NET, &["--tcp=nothing.invalid:80"]).args(["lookup", "nothing.invalid"]);
        let unknown = unknown.run().code(1).stdout("");
        assert!(!unknown.stderr_text().contains("refused"), "{}", unknown.transcript());
        let unknown = run(way, FETCH, &["--http=nothing.invalid"]).arg("http://nothing.invalid/").run().code(1);
        unknown.stdout("").stderr_has("ErrorCode::DnsError");
    }
}

/// A name of this machine, beside `localhost`, that leads to an address which is nobody else's.
fn private_name() -> Option<(String, IpAddr)> {
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let names = hosts.lines().filter_map(|line| line.split('#').next()?.split_whitespace().nth(1)).map(str::to_owned);
    names.chain([own]).filter(|name| name != "localhost" && !name.starts_with("ip6-")).find_map(|name| {
        let ip = (name.as_str(), 0).to_socket_addrs().ok()?.next()?.ip();
        ip.is_loopback().then_some((name, ip))
    })
}

/// Where a machine has no such name, the tests beside the policy hold this alone.
#[test]
fn a_name_does_not_lead_to_a_private_address() {
    let Some((name, ip)) = private_name() else { return };
    let port = Forbidden::at((ip, 0));
    let (address, to) = (port.address(), format!("{name}:{}", port.address().port()));
    for way in WAYS {
        let expected = refused(&format!("connect to {address}"), &format!("--tcp {address}"));
        run(way, NET, &["--tcp", &to]).args(["connect", &to]).run().said(1, "", &[expected, DENIED.into()]);
        let expected = refused(
            &format!("send requests to {address}, a private address that {name} leads to"),
            &format!("--http {address}"),
        );
        let url = format!("http://{to}/");
        let prohibited = "ErrorCode::DestinationIpProhibited\n".to_owned();
        run(way, FETCH, &["--http", &to]).arg(&url).run().said(1, "", &[expected, prohibited]);
        port.was_left_alone();
        // but where the address is named, too, it does
        let address = address.to_string();
        let both = run(way, NET, &["--tcp", &to, "--tcp", &address]).args(["hold", &to, "1"]);
        both.run().said(0, "1\n", &[]);
        port.0.accept().unwrap();
    }
}

#[test]
fn nobody_binds_listens_or_sends_datagrams() {
    for way in WAYS {
        for grants in [&[][..], &["--tcp=127.0.0.1:80", "--tcp=0.0.0.0/0:80", "--http=0.0.0.0/0", "--tcp=[::/0]:80"]] {
            for act in ["bind", "listen", "udp"] {
                let said = run(way, NET, grants).arg(act).run().code(1).stdout("").stderr_text();
                assert!(said.contains(DENIED), "{way} {act}: {said}");
            }
        }
    }
}

#[test]
fn requests_go_to_the_host_that_is_granted_and_to_no_other() {
    let granted = http();
    let other_port = Forbidden::at("127.0.0.1:0");
    let other_host = Forbidden::at(("127.0.0.2", granted.port()));
    for way in WAYS {
        for host in ["127.0.0.1", "127.0.0.0/16", "localhost", "[::ffff:127.0.0.1]"] {
            let grant = format!("--http={host}:{}", granted.port());
            let url = format!("http://{granted}/");
            run(way, FETCH, &[&grant]).arg(&url).run().said(0, "200 hello\n", &[]);
            for other in [&other_port, &other_host] {
                if host == "localhost" || host == "127.0.0.0/16" {
                    continue;
                }
                let to = other.address();
                let expected = refused(&format!("send requests to {to}"), &format!("--http {to}"));
                let url = format!("http://{to}/");
                run(way, FETCH, &[&grant]).arg(&url).run().said(1, "", &[expected, HTTP_DENIED.into()]);
            }
        }
        let grant = format!("--http=localhost:{}", granted.port());
        for host in ["localhost", "LOCALHOST.", "127.0.0.1", "[::ffff:127.0.0.1]"] {
            let url = format!("http://{host}:{}/", granted.port());
            run(way, FETCH, &[&grant]).arg(&url).run().said(0, "200 hello\n", &[]);
        }
        // a port that is not named is that of the scheme
        let expected = refused(&format!("send requests to {granted}"), &format!("--http {granted}"));
        let url = format!("http://{granted}/");
        run(way, FETCH, &["--http=127.0.0.1"]).arg(&url).run().said(1, "", &[expected, HTTP_DENIED.into()]);
        // a grant of another kind
        let tcp = format!("--tcp={granted}");
        run(way, FETCH, &[&tcp]).arg(&url).run().code(1).stdout("").stderr_has(HTTP_DENIED);
    }
    other_port.was_left_alone();
    other_host.was_left_alone();
}

#[test]
fn a_redirect_is_a_request_like_any_other() {
    let (first, second) = (http(), http());
    let forbidden = Forbidden::at(("127.0.0.2", first.port()));
    for way in WAYS {
        let url = |to: &SocketAddr| format!("http://{first}/to?http://{to}/");
        let one = [format!("--http={first}")];
        let one: Vec<&str> = one.iter().map(String::as_str).collect();
        run(way, FETCH, &one).arg(url(&first)).run().said(0, "200 hello\n", &[]);
        for to in [second, forbidden.address()] {
            let expected = refused(&format!("send requests to {to}"), &format!("--http {to}"));
            run(way, FETCH, &one).arg(url(&to)).run().said(1, "", &[expected, HTTP_DENIED.into()]);
        }
        let both = [format!("--http={first}"), format!("--http={second}")];
        run(way, FETCH, &both.each_ref().map(String::as_str)).arg(url(&second)).run().said(0, "200 hello\n", &[]);
    }
    forbidden.was_left_alone();
}

#[test]
fn neither_authority_nor_headers_make_a_request_look_like_another() {
    let granted = http();
    let forbidden = Forbidden::at("127.0.0.1:0");
    let to = forbidden.address();
    for way in WAYS {
        let grant = format!("--http={granted}");
        let fetch = |args: &[&str]| run(way, FETCH, &[&grant]).args(args).run();
        for url in [
            format!("http://{granted}@{to}/"),
            format!("http://user:password@{granted}/"),
            format!("http://127.0.0.1:{}:{}/", granted.port(), to.port()),
            format!("http://2130706433:{}/", granted.port()),
            format!("http://127.1:{}/", granted.port()),
        ] {
            let refused = fetch(&[&url]).code(1).stdout("");
            assert!(!refused.stderr_text().contains("Denied"), "{}", refused.transcript());
        }
        let expected = refused(&format!("send requests to {to}"), &format!("--http {to}"));
        let other = format!("host={granted}");
        // which host it is, the host says
        fetch(&["--header", &other, &format!("http://{granted}/")]).code(1).stderr_has("Forbidden");
        fetch(&[&format!("http://{to}/?@{granted}/")]).said(1, "", &[expected, HTTP_DENIED.into()]);
        let own = format!("200 [\"host: {granted}\"]\n");
        fetch(&[&format!("http://{granted}/host")]).said(0, &own, &[]);
    }
    forbidden.was_left_alone();
}

#[test]
fn bodies_go_both_ways_whatever_their_size() {
    let server = http();
    let grant = format!("--http={server}");
    for way in WAYS {
        let large = format!("http://{server}/large?20000000");
        run(way, FETCH, &[&grant]).args(["--count", &large]).run().said(0, "200 20000000\n", &[]);
        let posted = format!("http://{server}/posted");
        run(way, FETCH, &[&grant]).args(["--post", "3000000", &posted]).run().said(0, "200 3000000\n", &[]);
    }
}

#[test]
fn what_goes_wrong_has_its_code() {
    let server = http();
    // nobody accepts, and so nobody answers
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for way in WAYS {
        let grants = [server, mute.local_addr().unwrap(), closed].map(|address| format!("--http={address}"));
        let grants = grants.each_ref().map(String::as_str);
        let fails = |args: &[&str], code: &str| {
            run(way, FETCH, &grants).args(args).run().said(1, "", &[format!("ErrorCode::{code}\n")]);
        };
        fails(&[&format!("http://{closed}/")], "ConnectionRefused");
        fails(&[&format!("http://{server}/nothing")], "HttpResponseIncomplete");
        // and within a body
        fails(&[&format!("http://{server}/short")], "HttpResponseIncomplete");
        fails(&["--ms", "50", &format!("http://{server}/stalled")], "ConnectionReadTimeout");
        fails(&[&format!("http://{server}/nonsense")], "HttpProtocolError");
        fails(&[&format!("http://{server}/endless-head")], "HttpResponseHeaderSectionSize(None)");
        fails(&["--ms", "50", &format!("http://{}/", mute.local_addr().unwrap())], "ConnectionReadTimeout");
    }
}

/// Who vouches for servers, and the certificate that it gave one with these names.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A server that has a certificate of this authority for these names.
    fn server(&self, names: &[&str]) -> SocketAddr {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let config = Arc::new(config);
        serve("127.0.0.1:0", move |stream| {
            let mut secured = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream);
            answer(&mut secured);
            secured.conn.send_close_notify();
            let _ = secured.flush();
        })
    }
}

#[test]
fn https_believes_who_is_vouched_for() {
    let (trusted, other) = (Authority::new(), Authority::new());
    let folder = Folder::new().file("trusted.pem", &trusted.pem).file("other.pem", &other.pem).file("none.pem", "");
    let (named, misnamed) = (trusted.server(&["localhost", "127.0.0.1"]), trusted.server(&["example.org"]));
    let plain = serve("127.0.0.1:0", |mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read_to_end(&mut vec![]);
    });
    for way in WAYS {
        let fetch = |roots: &str, host: &str, server: &SocketAddr| {
            let grant = format!("--http={host}:{}", server.port());
            let run = folder.wrun(["run", "--isolation", way, &grant, FETCH, "--"]);
            run.env("SSL_CERT_FILE", roots).arg(format!("https://{host}:{}/", server.port())).run()
        };
        let fails = |roots: &str, server: &SocketAddr, code: &str| {
            fetch(roots, "localhost", server).said(1, "", &[format!("ErrorCode::{code}\n")]);
        };
        fetch("trusted.pem", "localhost", &named).said(0, "200 hello\n", &[]);
        fetch("trusted.pem", "127.0.0.1", &named).said(0, "200 hello\n", &[]);
        let absolute = folder.path("trusted.pem");
        fetch(absolute.to_str().unwrap(), "localhost", &named).said(0, "200 hello\n", &[]);
        fails("other.pem", &named, "TlsCertificateError");
        fails("trusted.pem", &misnamed, "TlsCertificateError");
        fails("trusted.pem", &plain, "TlsProtocolError");
        // nobody is trusted at all
        fails("none.pem", &named, "ConfigurationError");
        fails("missing.pem", &named, "ConfigurationError");
        // those of the system, of which there may be none, do not know it
        let grant = format!("--http=localhost:{}", named.port());
        let url = format!("https://localhost:{}/", named.port());
        let unknown = run(way, FETCH, &[&grant]).arg(&url).run().code(1).stdout("").stderr_text();
        assert!(unknown.contains("TlsCertificateError") || unknown.contains("ConfigurationError"), "{unknown}");
    }
}

#[test]
fn an_instance_has_so_many_sockets() {
    let address = serve("127.0.0.1:0", |mut stream| drop(stream.read(&mut [0])));
    let grant = format!("--tcp={address}");
    for way in WAYS {
        let hold = |times: &str| run(way, NET, &[&grant]).args(["hold", &address.to_string(), times]);
        // those that are closed do not count
        hold("32").args(["hold", &address.to_string(), "32"]).run().said(0, "32\n32\n", &[]);
        hold("33").run().code(1).stdout("").stderr_has("No file descriptors available");
    }
}

#[test]
fn requests_that_are_forgotten_cost_nothing() {
    // together they are more than a jailed process has
    let (header, times) = (format!("x={}", "x".repeat(20_000)), "30000");
    let (granted, forbidden) = (http(), Forbidden::at("127.0.0.1:0"));
    let fetch = |grants: &[&str], to: &SocketAddr| {
        let url = format!("http://{to}/");
        run("jail", FETCH, grants).args(["--header", &header, "--forget", times, &url]).run()
    };
    // nor do they leave anything behind that counts for what a guest holds
    let to = forbidden.address();
    let refused = refused(&format!("send requests to {to}"), &format!("--http {to}"));
    fetch(&[], &to).said(1, "", &[refused, HTTP_DENIED.into()]);
    forbidden.was_left_alone();
    fetch(&["--http", &granted.to_string()], &granted).code(0).stderr("").stdout("200 hello\n");
}

#[test]
fn each_refusal_is_told_once_and_not_without_end() {
    for way in WAYS {
        let twice = ["connect", "127.0.0.1:7", "connect", "127.0.0.1:7"];
        let said = run(way, NET, &["--tcp=127.0.0.1:1"]).args(twice).run().code(1).stderr_text();
        assert_eq!((said.matches("refused").count(), said.matches(DENIED).count()), (1, 2), "{said}");
        let many = (10..50).flat_map(|port| ["connect".to_owned(), format!("127.0.0.1:{port}")]);
        let said = run(way, NET, &["--tcp=127.0.0.1:1"]).args(many).run().code(1).stderr_text();
        assert_eq!((said.matches("refused").count(), said.matches(DENIED).count()), (16, 40), "{said}");
    }
    let denied = wrun(["run", "--log-format=json", NET, "--", "connect", "127.0.0.1:7"]).run().code(1).stderr_text();
    let denied: Value = serde_json::from_str(denied.lines().next().unwrap()).unwrap();
    let reason = "the guest may not connect to 127.0.0.1:7";
    assert_eq!(denied, json!({"event": "denied", "grant": "--tcp 127.0.0.1:7", "reason": reason}));
}

#[test]
fn children_have_their_grants_and_tell_what_they_lack() {
    let (granted, by_http) = (lines("127.0.0.1:0"), http());
    let forbidden = Forbidden::at("127.0.0.1:0");
    let (to, denied) = (granted.to_string(), forbidden.address().to_string());
    let (reason, missing) = (format!("connect to {denied}"), format!("--tcp {denied}"));
    for isolation in ["process", "jail"] {
        for mode in ["spawn", "exec"] {
            let plain = |guest: &str, args: &[&str]| {
                let grants = [format!("--tcp={to}"), format!("--http={by_http}")];
                wrun([mode, "--isolation", isolation, guest]).args(grants).args(["--"]).args(args).run()
            };
            plain(NET, &["connect", &to]).said(0, "got hello\n", &[]);
            plain(NET, &["connect", &denied]).said(1, "", &[refused(&reason, &missing), DENIED.into()]);
            plain(FETCH, &[&format!("http://{by_http}/")]).code(0).stderr("");
            let other = refused(&format!("send requests to {denied}"), &format!("--http {denied}"));
            plain(FETCH, &[&format!("http://{denied}/")]).said(1, "", &[other, HTTP_DENIED.into()]);
        }
    }
    let event =
        json!({"event": "denied", "worker": 1, "grant": missing, "reason": format!("the guest may not {reason}")});
    let ran = wrun(["spawn", "--json", &format!("--tcp={to}"), NET, "--", "connect", &denied]).run().code(1);
    assert!(crate::spawn::events(&ran.stdout_text()).contains(&event), "{}", ran.transcript());

    let task = |address: &str| json!({"do": "connect", "address": address}).to_string() + "\n";
    let tasks = [task(&to), task(&denied)].concat();
    let expected = "{\"line\":\"got hello\"}\n{\"error\":\"permission denied\"}\n";
    let fork = |args: &[&str]| wrun(["fork", &format!("--tcp={to}"), HOSTILE]).args(args).stdin(tasks.clone()).run();
    let line = format!("wrun: worker 1: refused: the guest may not {reason}; `{missing}` would allow it\n");
    fork(&[]).code(0).stdout(expected).stderr(line);
    let ran = fork(&["--log-format=json"]).code(0).stdout(expected);
    assert!(crate::supervision::events(&ran).contains(&event), "{}", ran.transcript());
    forbidden.was_left_alone();
}

#[test]
fn a_pool_fed_lines_has_its_grants_and_tells_what_it_lacks() {
    let granted = lines("127.0.0.1:0");
    let forbidden = Forbidden::at("127.0.0.1:0");
    let to = forbidden.address();
    let task = |address: String| json!({"do": "connect", "address": address}).to_string() + "\n";
    let by_name = format!("localhost:{}", granted.port());
    for isolation in ["process", "jail"] {
        for grant in [granted.to_string(), by_name.clone()] {
            let tasks = [task(grant.clone()), task(to.to_string()), task(to.to_string()), task(grant.clone())].concat();
            let grant = format!("--tcp={grant}");
            let args = ["cluster", "-w1", "--ordered", "--log-format=json", "--instance=task", HOSTILE];
            let done = wrun(args).args(["--isolation", isolation, &grant]).stdin(tasks).run().code(0);
            let replies: Vec<Value> =
                done.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let expected = |line: u64| match line {
                1 | 4 => json!({"line": line, "reply": {"line": "got hello"}}),
                _ => json!({"line": line, "reply": {"error": "permission denied"}}),
            };
            assert_eq!(replies, (1..=4).map(expected).collect::<Vec<_>>(), "{}", done.transcript());
            let denied: Vec<Value> =
                crate::supervision::events(&done).into_iter().filter(|event| event["event"] == "denied").collect();
            let reason = format!("the guest may not connect to {to}");
            let grant = format!("--tcp {to}");
            assert_eq!(denied, [json!({"event": "denied", "worker": 1, "grant": grant, "reason": reason})]);
        }
    }
    let args = ["cluster", "-w1", HOSTILE, "--tcp=127.0.0.1:1"];
    let done = wrun(args).stdin(task(to.to_string())).run().code(0);
    let line = format!("wrun: worker 1: refused: the guest may not connect to {to}; `--tcp {to}` would allow it\n");
    done.stderr_has(&line);
    forbidden.was_left_alone();
}

#[test]
fn a_pool_behind_a_port_has_its_grants_and_tells_what_it_lacks() {
    let authority = Authority::new();
    let folder = Folder::new().file("trusted.pem", &authority.pem);
    let (plain, secured) = (http(), authority.server(&["localhost"]));
    let forbidden = Forbidden::at(("127.0.0.2", plain.port()));
    let grants = [format!("--http={plain}"), format!("--http=localhost:{}", secured.port())];
    for isolation in ["process", "jail"] {
        let args = ["cluster", GATEWAY, "--listen=0", "-w1", "--log-format=json", "--isolation", isolation];
        let mut server = Server::start(folder.wrun(args).args(&grants).env("SSL_CERT_FILE", "trusted.pem"));
        let fetch = |url: String| {
            let response = server.get(&format!("/?url={url}"));
            (response.status, response.text())
        };
        assert_eq!(fetch(format!("http://{plain}/")), (200, "hello".into()));
        assert_eq!(fetch(format!("https://localhost:{}/", secured.port())), (200, "hello".into()));
        let to = forbidden.address();
        assert_eq!(fetch(format!("http://{to}/")), (502, "ErrorCode::HttpRequestDenied".into()));
        // others are served while one waits
        assert_eq!(fetch(format!("http://{plain}/")), (200, "hello".into()));
        let denied = event(&mut server, "denied");
        assert_eq!((&denied["worker"], &denied["grant"]), (&json!(1), &json!(format!("--http {to}"))));
        assert_eq!(denied["reason"], json!(format!("the guest may not send requests to {to}")));
    }
    forbidden.was_left_alone();
}

/// It has sockets, and everything else is as closed as it is for others.
#[test]
fn a_worker_with_a_grant_is_in_the_jail() {
    let args = ["cluster", ECHO, "-w1", "--log-format=json", "--tcp=localhost:1", "--http=example.org"];
    let mut pool = wrun(args).stdin_open().spawn();
    is_jailed(pid(&event(&mut pool, "online")["pid"]));
    pool.close_stdin();
    pool.wait().code(0);
}

#[test]
fn what_is_no_grant_is_a_usage_error_that_says_what_was_expected() {
    for (flag, value, expected) in [
        ("--tcp", "localhost", "expected `HOST:PORT`"),
        ("--tcp", "localhost:0", "expected `HOST:PORT`"),
        ("--tcp", "::1:80", "expected `HOST:PORT`"),
        ("--http", "https://example.org", "expected `HOST[:PORT]`"),
        ("--http", "*.example.org", "expected `HOST[:PORT]`"),
        ("--http", "10.0.0.0/33", "expected `HOST[:PORT]`"),
    ] {
        for args in [&["run", NET][..], &["cluster", ECHO]] {
            let refused = wrun(args).args([flag, value]).run().code(2).stdout("");
            refused.stderr_has(&format!("{expected}, where HOST is a name, an address or a network")).stderr_has(value);
        }
    }
}
