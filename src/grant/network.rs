//! Which addresses a guest may connect to. Pure: grants and addresses in, yes or no out.
//!
//! An address is allowed when a grant names it literally, or when it is a public one that a granted name led to. What is
//! not public (loopback, private and link-local networks, the metadata services of clouds) is never reached by a name alone:
//! whoever owns the name decides where it leads. A machine's own public address is one of the internet like any other.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::Grants;

/// Whom a network grant names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// A DNS name, in lower case and without a dot at its end. `localhost` also names the loopback addresses.
    Name(String),
    /// An address, or all of a network. An IPv4 address in its IPv6 form is that IPv4 address.
    Net(IpNet),
}

/// A host that the guest may send HTTP requests to: `HOST[:PORT]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpGrant {
    /// Whom.
    pub host: Host,
    /// On which port; none is 80 for http and 443 for https.
    pub port: Option<u16>,
}

/// An address that the guest may open TCP connections to: `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpGrant {
    /// Whom.
    pub host: Host,
    /// On which port.
    pub port: u16,
}

/// What a guest was refused, and the grant that would have allowed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// The flag, such as `--tcp 127.0.0.1:5432`.
    pub grant: String,
    /// What the guest may not do, in words.
    pub reason: String,
}

/// How many refusals of one worker are told.
pub(crate) const REFUSALS_MAX: usize = 16;

/// The longest text of a refusal, in bytes: two names, and what is said around them.
const DENIED_MAX: usize = 3 * NAME_MAX;

impl Denied {
    /// Reads what a worker says of a refusal. It is shown as wrun's own words, so it must be what wrun would say.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let denied: Self = serde_json::from_slice(bytes).ok()?;
        let is_grant = match denied.grant.split_once(' ')? {
            ("--http", host) => host.parse::<HttpGrant>().is_ok(),
            // the port of a lookup is not known, and nothing of a socket that was not made
            ("--tcp", "HOST:PORT") => true,
            ("--tcp", to) => to.strip_suffix(":PORT").map_or(to.parse::<TcpGrant>().is_ok(), |to| name(to).is_some()),
            _ => false,
        };
        let is_reason = denied.reason.starts_with("the guest may not ") && denied.reason.len() <= DENIED_MAX;
        (is_grant && is_reason).then_some(denied)
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; `{}` would allow it", self.reason, self.grant)
    }
}

/// Whom a guest asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A name, as [`Host::Name`] has it.
    Name(String),
    /// An address; an IPv4 one is never in its IPv6 form.
    Address(IpAddr),
}

impl Target {
    /// Reads a name or an address; an IPv6 one may stand in brackets. None when it is neither.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        match (bare, text.parse::<IpAddr>()) {
            (Some(bare), _) => bare.parse::<Ipv6Addr>().ok().map(|ip| Self::Address(IpAddr::V6(ip).to_canonical())),
            (None, Ok(ip)) => Some(Self::Address(ip.to_canonical())),
            (None, Err(_)) => name(text).map(Self::Name),
        }
    }
}

/// `host:port`, or the host alone, as URLs and grants have it.
pub(crate) fn host_and_port(host: &impl fmt::Display, port: Option<u16>) -> String {
    let host = host.to_string();
    match port {
        None => host,
        Some(port) if host.contains(':') => format!("[{host}]:{port}"),
        Some(port) => format!("{host}:{port}"),
    }
}

/// The port of a scheme.
pub(crate) fn default_port(https: bool) -> u16 {
    if https { 443 } else { 80 }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(ip) => ip.fmt(f),
        }
    }
}

impl Host {
    /// Whether this is the address, or a network that it is in.
    fn names(&self, ip: IpAddr) -> bool {
        match self {
            Self::Net(net) => net.contains(&ip),
            Self::Name(name) => name == LOCALHOST && ip.is_loopback(),
        }
    }

    fn is(&self, other: &str) -> bool {
        matches!(self, Self::Name(name) if name == other)
    }
}

/// The name that is not DNS's to give away.
const LOCALHOST: &str = "localhost";

impl HttpGrant {
    fn takes(&self, https: bool, port: u16) -> bool {
        port == self.port.unwrap_or(default_port(https))
    }
}

impl Grants {
    /// Whether a name is granted, so that names have to be looked up.
    pub(crate) fn have_names(&self) -> bool {
        self.hosts().any(|host| matches!(host, Host::Name(_)))
    }

    /// Whether this name may be looked up.
    pub(crate) fn allow_lookup(&self, name: &str) -> bool {
        self.hosts().any(|host| host.is(name))
    }

    /// All ports that may be connected to, each once.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let http = self.http.iter().flat_map(|grant| match grant.port {
            Some(port) => [port, port],
            None => [default_port(false), default_port(true)],
        });
        let mut ports: Vec<u16> = self.tcp.iter().map(|grant| grant.port).chain(http).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Whether a TCP connection to this address may be made. `led_to` knows which names led to it.
    pub(crate) fn allow_tcp(&self, address: SocketAddr, led_to: impl Fn(&str, IpAddr) -> bool) -> bool {
        let ip = address.ip().to_canonical();
        self.tcp.iter().filter(|grant| grant.port == address.port()).any(|grant| match &grant.host {
            host if host.names(ip) => true,
            Host::Name(name) => is_public(ip) && led_to(name, ip),
            Host::Net(_) => false,
        })
    }

    /// Whether requests to this host may be made at all; where a name leads, is another question.
    pub(crate) fn allow_http(&self, target: &Target, https: bool, port: u16) -> bool {
        self.http.iter().filter(|grant| grant.takes(https, port)).any(|grant| match target {
            Target::Name(name) => grant.host.is(name),
            Target::Address(ip) => grant.host.names(*ip),
        })
    }

    /// Whether a request to a granted name may go to this address, which the name led to.
    pub(crate) fn allow_http_at(&self, ip: IpAddr, https: bool, port: u16) -> bool {
        is_public(ip) || self.allow_http(&Target::Address(ip.to_canonical()), https, port)
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.http.iter().map(|grant| &grant.host).chain(self.tcp.iter().map(|grant| &grant.host))
    }
}

/// IPv4 networks that are not public, by IANA's register of special addresses; multicast and what is above it, too.
const SPECIAL_V4: [(Ipv4Addr, u8); 16] = [
    (Ipv4Addr::UNSPECIFIED, 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    // public by its number, and in Azure the machine's own host
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// The IPv6 addresses that are public at all, and those among them that are not: of protocols (Teredo and benchmarking
/// among them), documentation, 6to4, documentation again. All that carry an IPv4 address in them are outside, or here.
const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const SPECIAL_V6: [(Ipv6Addr, u8); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Whether an address is one of the internet, and of nobody's own network.
pub(crate) fn is_public(ip: IpAddr) -> bool {
    let within = |(net, prefix), ip: Ipv6Addr| Ipv6Net::new_assert(net, prefix).contains(&ip);
    match ip.to_canonical() {
        IpAddr::V4(ip) => !SPECIAL_V4.iter().any(|(net, prefix)| Ipv4Net::new_assert(*net, *prefix).contains(&ip)),
        IpAddr::V6(ip) => within(GLOBAL_V6, ip) && !SPECIAL_V6.iter().any(|special| within(*special, ip)),
    }
}

/// A DNS name in its one form; none when it is none. A name whose last part is a number is an address to some readers.
fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let last = text.rsplit('.').next()?.to_ascii_lowercase();
    let is_number = last.strip_prefix("0x").map_or_else(
        || last.bytes().all(|byte| byte.is_ascii_digit()),
        |digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
    );
    let is_name = text.len() <= NAME_MAX && text.split('.').all(is_label) && !is_number;
    is_name.then(|| text.to_ascii_lowercase())
}

/// The longest name that DNS has, in bytes.
pub(crate) const NAME_MAX: usize = 253;

/// A network in its one form.
fn net(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?.trunc();
    Some(match net {
        IpNet::V6(v6) => match (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) {
            (Some(v4), Some(prefix)) => IpNet::V4(Ipv4Net::new_assert(v4, prefix)),
            _ => net,
        },
        IpNet::V4(_) => net,
    })
}

/// Reads `HOST` or `HOST:PORT`.
fn read(text: &str) -> Option<(Host, Option<u16>)> {
    let host = |text: &str| net(text).map(Host::Net).or_else(|| name(text).map(Host::Name));
    let port = |text: &str| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| is_number && *port > 0)
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (inside, after) = rest.split_once(']')?;
        let host = Host::Net(net(inside).filter(|_| inside.contains(':'))?);
        return match after.strip_prefix(':') {
            Some(after) => Some((host, Some(port(after)?))),
            None => after.is_empty().then_some((host, None)),
        };
    }
    if let Some(host) = host(text) {
        return Some((host, None));
    }
    let (before, after) = text.rsplit_once(':')?;
    // without brackets nobody can tell where such an address ends
    if before.contains(':') {
        return None;
    }
    Some((host(before)?, Some(port(after)?)))
}

/// What a host can be, for errors.
const HOSTS: &str = "where HOST is a name, an address or a network such as `10.0.0.0/8`, an IPv6 one in brackets when a \
    port follows";

impl FromStr for HttpGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected `HOST[:PORT]`, {HOSTS}; found `{text}`");
        let (host, port) = read(text).ok_or_else(expected)?;
        Ok(Self { host, port })
    }
}

impl FromStr for TcpGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected `HOST:PORT`, {HOSTS}; found `{text}`");
        match read(text) {
            Some((host, Some(port))) => Ok(Self { host, port }),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Net(net) if net.prefix_len() == net.max_prefix_len() => net.addr().fmt(f),
            Self::Net(net) => net.fmt(f),
        }
    }
}

impl fmt::Display for HttpGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, self.port))
    }
}

impl fmt::Display for TcpGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, Some(self.port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(http: &[&str], tcp: &[&str]) -> Grants {
        let http = http.iter().map(|text| text.parse().expect(text)).collect();
        Grants { http, tcp: tcp.iter().map(|text| text.parse().expect(text)).collect(), ..Grants::default() }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn target(text: &str) -> Target {
        Target::parse(text).expect(text)
    }

    #[test]
    fn grants_are_read_and_written() {
        for (text, written) in [
            ("example.org:443", "example.org:443"),
            ("Example.ORG.:443", "example.org:443"),
            ("_a.b-c:1", "_a.b-c:1"),
            ("127.0.0.1:65535", "127.0.0.1:65535"),
            ("[::1]:5432", "[::1]:5432"),
            ("[FD00::1]:5432", "[fd00::1]:5432"),
            ("10.0.0.0/8:5432", "10.0.0.0/8:5432"),
            ("10.1.2.3/8:5432", "10.0.0.0/8:5432"),
            ("10.1.2.3/32:1", "10.1.2.3:1"),
            ("[fd00::/8]:5432", "[fd00::/8]:5432"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("[::ffff:10.0.0.0/104]:80", "10.0.0.0/8:80"),
            ("localhost:80", "localhost:80"),
        ] {
            assert_eq!(text.parse::<TcpGrant>().expect(text).to_string(), written);
            assert_eq!(text.parse::<HttpGrant>().expect(text).to_string(), written);
            assert_eq!(written.parse::<TcpGrant>().expect(written).to_string(), written);
        }
        for text in ["example.org", "127.0.0.1", "::1", "10.0.0.0/8", "fd00::/8", "::/0", "localhost"] {
            assert_eq!(text.parse::<HttpGrant>().expect(text).to_string(), text);
            let error = text.parse::<TcpGrant>().expect_err(text);
            assert!(error.starts_with("expected `HOST:PORT`, where HOST is"), "{error}");
        }
        assert_eq!("[::1]".parse::<HttpGrant>().expect("an address").to_string(), "::1");
    }

    #[test]
    fn what_is_no_grant_is_refused() {
        let longest = "a.".repeat(126) + "a";
        let longer = format!("a.{longest}:1");
        assert!(longest.len() == NAME_MAX && format!("{longest}.:1").parse::<TcpGrant>().is_ok());
        for text in [
            "",
            ":",
            ":80",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:x",
            "a b:1",
            "a..b:1",
            ".:1",
            ".a:1",
            "a..:1",
            "*:1",
            "*.example.org:1",
            "http://a:1",
            "http://a",
            "a/b:1",
            "a/8:1",
            "u@a:1",
            "a:1/",
            "::1:80:",
            "[::1:80",
            "[::1]80",
            "[::1]x",
            "[a]:1",
            "[10.0.0.1]:1",
            "[]:1",
            "10.0.0.0/33:1",
            "10.0.0.256:1",
            "1.2.3:1",
            "127.1:1",
            "2130706433:1",
            "0x7f.1:1",
            "a.0x7f:1",
            "0x:1",
            "bücher.example:1",
            "a\u{0}b:1",
            "a\n:1",
            &longer,
            &format!("{}:1", "a".repeat(64)),
        ] {
            assert!(text.parse::<TcpGrant>().is_err(), "{text}");
            assert!(text.parse::<HttpGrant>().is_err(), "{text}");
        }
    }

    #[test]
    fn targets_are_read_in_their_one_form() {
        for (text, read) in [
            ("Example.org.", "example.org"),
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("::ffff:127.0.0.1", "127.0.0.1"),
            ("[::FFFF:7f00:1]", "127.0.0.1"),
        ] {
            assert_eq!(target(text).to_string(), read);
        }
        for text in ["", "a@b", "[127.0.0.1]", "[a]", "[::1", "127.1", "0177.0.0.1", "fe80::1%1", "a:1", "a/b", "1"] {
            assert_eq!(Target::parse(text), None, "{text}");
        }
    }

    #[test]
    fn public_is_what_is_nobodys_own() {
        for text in ["8.8.8.8", "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.0.1"] {
            assert!(is_public(ip(text)), "{text}");
        }
        for text in ["172.32.0.0", "192.0.1.0", "198.17.0.0", "198.20.0.0", "223.255.255.255", "::ffff:8.8.8.8"] {
            assert!(is_public(ip(text)), "{text}");
        }
        for text in ["2606:4700::1111", "2001:4860:4860::8888", "2a00::1", "3fff:1000::"] {
            assert!(is_public(ip(text)), "{text}");
        }
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "168.63.129.16",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(ip(text)), "{text}");
        }
    }

    #[test]
    fn tcp_goes_to_what_is_named() {
        let grants = grants(&["1.2.3.4"], &["127.0.0.1:80", "10.0.0.0/8:81", "[::1]:82", "[fd00::/8]:83"]);
        let allowed = |address: &str| grants.allow_tcp(address.parse().expect(address), |_, _| true);
        for address in ["127.0.0.1:80", "[::ffff:127.0.0.1]:80", "10.1.2.3:81", "[::1]:82", "[fd12::1]:83"] {
            assert!(allowed(address), "{address}");
        }
        for address in
            ["127.0.0.1:81", "127.0.0.2:80", "11.0.0.0:81", "[::1]:80", "[::]:82", "[fc00::1]:83", "8.8.8.8:80"]
        {
            assert!(!allowed(address), "{address}");
        }
        // that is another kind of grant
        assert!(!allowed("1.2.3.4:80"));
    }

    #[test]
    fn all_of_ipv6_is_nothing_of_ipv4() {
        let grants = grants(&["::/0"], &["[::/0]:80"]);
        assert!(grants.allow_tcp("[::1]:80".parse().expect("an address"), |_, _| false));
        assert!(!grants.allow_tcp("[::ffff:127.0.0.1]:80".parse().expect("an address"), |_, _| false));
        assert!(!grants.allow_http(&target("[::ffff:127.0.0.1]"), false, 80));
    }

    #[test]
    fn a_name_leads_to_public_addresses_only() {
        let grants = grants(&["example.org"], &["db.example.org:5432", "127.0.0.9:5432"]);
        let led_to = |name: &str, _| name == "db.example.org";
        let allowed = |address: &str| grants.allow_tcp(address.parse().expect(address), led_to);
        assert!(allowed("8.8.8.8:5432") && allowed("[2606:4700::1]:5432"));
        assert!(!allowed("8.8.8.8:5433"));
        for private in ["127.0.0.1:5432", "169.254.169.254:5432", "[::1]:5432", "[::ffff:10.0.0.1]:5432"] {
            assert!(!allowed(private), "{private}");
        }
        // unless it is named, too
        assert!(allowed("127.0.0.9:5432"));
        // somebody has to have looked it up
        assert!(!grants.allow_tcp("8.8.8.8:5432".parse().expect("an address"), |_, _| false));

        assert!(grants.allow_http_at(ip("8.8.8.8"), true, 443));
        assert!(!grants.allow_http_at(ip("127.0.0.1"), true, 443));
        // that one is named for connections of another kind
        assert!(!grants.allow_http_at(ip("127.0.0.9"), false, 5432));
    }

    #[test]
    fn localhost_is_the_loopback_range() {
        let grants = grants(&["localhost"], &["LOCALHOST.:80"]);
        for address in ["127.0.0.1:80", "127.1.2.3:80", "[::1]:80"] {
            assert!(grants.allow_tcp(address.parse().expect(address), |_, _| false), "{address}");
        }
        assert!(!grants.allow_tcp("10.0.0.1:80".parse().expect("an address"), |_, _| true));
        assert!(grants.allow_http(&target("localhost"), false, 80) && grants.allow_http(&target("::1"), false, 80));
        assert!(!grants.allow_http(&target("a.localhost"), false, 80));
    }

    #[test]
    fn http_goes_to_its_ports() {
        let grants = grants(&["a.example", "b.example:8080", "10.0.0.0/8"], &["c.example:80"]);
        let allowed = |host, https, port| grants.allow_http(&target(host), https, port);
        assert!(allowed("A.example.", false, 80) && allowed("a.example", true, 443) && allowed("10.0.0.1", true, 443));
        assert!(allowed("b.example", false, 8080) && allowed("b.example", true, 8080));
        assert!(
            !allowed("a.example", true, 80) && !allowed("a.example", false, 443) && !allowed("a.example", true, 8080)
        );
        assert!(
            !allowed("b.example", false, 80) && !allowed("c.example", false, 80) && !allowed("11.0.0.1", false, 80)
        );
        assert!(!allowed("x.a.example", false, 80) && !allowed("example", false, 80));
    }

    #[test]
    fn names_and_ports_are_known() {
        let all = grants(&["a.example", "1.2.3.4:8080", "5.6.7.8"], &["b.example:5432", "[::1]:80"]);
        assert_eq!(all.ports(), [80, 443, 5432, 8080]);
        assert!(all.have_names());
        assert!(all.allow_lookup("a.example") && all.allow_lookup("b.example"));
        assert!(!all.allow_lookup("c.example") && !all.allow_lookup("x.a.example") && !all.allow_lookup("1.2.3.4"));
        let addresses = grants(&["1.2.3.4"], &["[::1]:80"]);
        assert!(!addresses.have_names());
        assert!(Grants::default().ports().is_empty());
    }

    #[test]
    fn what_a_worker_says_of_a_refusal_is_what_wrun_would_say() {
        let read = |grant: &str, reason: &str| {
            let text = serde_json::to_vec(&Denied { grant: grant.into(), reason: reason.into() }).expect("plain data");
            Denied::read(&text).is_some()
        };
        for grant in
            ["--tcp [::1]:80", "--tcp a.example:80", "--tcp a.example:PORT", "--tcp HOST:PORT", "--http a.example"]
        {
            assert!(read(grant, "the guest may not do so"), "{grant}");
        }
        for grant in ["", "--dir /", "--tcp", "--tcp a b:80", "--http a.example --dir /", "--http ", "--tcp :PORT"] {
            assert!(!read(grant, "the guest may not do so"), "{grant}");
        }
        assert!(!read("--tcp a.example:80", "send money"));
        assert!(read("--tcp a.example:80", &format!("the guest may not {}", "x".repeat(DENIED_MAX - 18))));
        assert!(!read("--tcp a.example:80", &format!("the guest may not {}", "x".repeat(DENIED_MAX - 17))));
        assert_eq!(Denied::read(b"{}"), None);
    }
}
