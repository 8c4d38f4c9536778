//! Who asks, and which of its headers are believed.
//!
//! A client can write what it likes into the headers by which proxies tell whom they speak for. They are taken from
//! trusted proxies only; of all others they are removed before a guest sees them.

use std::net::IpAddr;

use hyper::{
    HeaderMap,
    header::{FORWARDED, HeaderName, HeaderValue},
};
use ipnet::IpNet;

use crate::sandbox::Scheme;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What only a proxy may say.
const OF_PROXIES: [HeaderName; 7] = [
    FORWARDED,
    FORWARDED_FOR,
    FORWARDED_PROTO,
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-real-ip"),
    REQUEST_ID,
];

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) address: IpAddr,
    pub(super) scheme: Scheme,
}

impl Client {
    /// The client behind a peer, which may be a trusted proxy; what an untrusted one says of itself is removed.
    pub(super) fn of(peer: IpAddr, headers: &mut HeaderMap, trusted: &[IpNet]) -> Self {
        let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
        if !is_trusted(&peer) {
            for name in &OF_PROXIES {
                headers.remove(name);
            }
            return Self { address: peer, scheme: Scheme::Http };
        }
        // each proxy adds at the end whom it speaks for: the last that is no trusted proxy itself is the client, and
        // what stands before that one is only what it says
        let mut client = peer;
        let values = headers.get_all(FORWARDED_FOR).iter().rev().filter_map(|value| value.to_str().ok());
        for entry in values.flat_map(|value| value.rsplit(',')) {
            let Some(address) = address(entry) else { break };
            client = address;
            if !is_trusted(&address) {
                break;
            }
        }
        let is_https = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"https");
        Self {
            address: client,
            scheme: if headers.get(FORWARDED_PROTO).is_some_and(is_https) { Scheme::Https } else { Scheme::Http },
        }
    }
}

/// One entry of `x-forwarded-for`: an address, perhaps with a port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    text.trim_matches(['[', ']']).parse().ok().or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, headers: &[(&'static str, &'static str)], trusted: &[&str]) -> (Client, HeaderMap) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|net| net.parse().expect("a network")).collect();
        (Client::of(peer.parse().expect("an address"), &mut map, &trusted), map)
    }

    #[test]
    fn strangers_are_not_believed() {
        let headers = [("x-forwarded-for", "9.9.9.9"), ("x-forwarded-proto", "https"), ("accept", "*/*")];
        let (found, left) = client("1.2.3.4", &headers, &["10.0.0.0/8"]);
        assert_eq!(found, Client { address: [1, 2, 3, 4].into(), scheme: Scheme::Http });
        assert_eq!(left.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["accept"]);
    }

    #[test]
    fn proxies_name_the_client() {
        let trusted = ["10.0.0.0/8", "::1/128"];
        let of =
            |value: &'static str| client("10.0.0.1", &[("x-forwarded-for", value)], &trusted).0.address.to_string();
        assert_eq!(of("9.9.9.9"), "9.9.9.9");
        assert_eq!(of("6.6.6.6, 9.9.9.9, 10.0.0.7"), "9.9.9.9", "what the client itself wrote comes before");
        assert_eq!(of("what?, 9.9.9.9"), "9.9.9.9");
        assert_eq!(of("9.9.9.9:1234"), "9.9.9.9");
        assert_eq!(of("[2001:db8::1]:1234"), "2001:db8::1");
        assert_eq!(of("nonsense"), "10.0.0.1");
        assert_eq!(of("10.0.0.9"), "10.0.0.9", "a request of a proxy's own");
        let (found, left) = client("10.0.0.1", &[("x-forwarded-proto", "HTTPS")], &trusted);
        assert_eq!((found.scheme, left.len()), (Scheme::Https, 1));
    }
}
