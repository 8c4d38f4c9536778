//! What a guest may touch. Nothing, unless it is granted here.

mod network;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

pub use self::network::{Denied, Host, HttpGrant, TcpGrant};
pub(crate) use self::network::{NAME_MAX, REFUSALS_MAX, Target, default_port, host_and_port};

/// The abilities given to one guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// Folders (`--dir`).
    pub dirs: Vec<DirGrant>,
    /// Environment variables, name and value (`--env`). The guest sees these and no other.
    pub env: Vec<(String, String)>,
    /// Hosts that it may send HTTP requests to (`--http`).
    pub http: Vec<HttpGrant>,
    /// Addresses that it may open TCP connections to (`--tcp`).
    pub tcp: Vec<TcpGrant>,
}

impl Grants {
    /// With variables that tell the libraries of threads how many to make, unless they are given already.
    pub(crate) fn telling_threads(mut self, count: u32) -> Self {
        for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"] {
            if !self.env.iter().any(|(given, _)| given == name) {
                self.env.push((name.into(), count.to_string()));
            }
        }
        self
    }

    /// Sees that what is granted is there, before anything is started.
    ///
    /// # Errors
    /// Names the grant that is not.
    pub(crate) fn check(&self) -> Result<(), GrantError> {
        for dir in &self.dirs {
            let refused = |reason: String| GrantError { grant: format!("--dir {dir}"), reason };
            match std::fs::metadata(&dir.host) {
                Ok(meta) if meta.is_dir() => {}
                Ok(_) => return Err(refused("it is not a folder".into())),
                Err(error) => return Err(refused(error.to_string())),
            }
        }
        Ok(())
    }
}

/// What is granted is not there.
#[derive(Debug, thiserror::Error)]
#[error("could not grant `{grant}`: {reason}")]
pub struct GrantError {
    /// The grant as it was written.
    pub grant: String,
    /// Why it could not be given.
    pub reason: String,
}

/// A folder of the host that the guest may use: `HOST[::GUEST][:ro]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirGrant {
    /// The folder on the host.
    pub host: PathBuf,
    /// Its name in the guest.
    pub guest: String,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

impl FromStr for DirGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (paths, read_only) = match text.strip_suffix(":ro") {
            Some(paths) => (paths, true),
            None => (text.strip_suffix(":rw").unwrap_or(text), false),
        };
        let (host, guest) = paths.split_once("::").unwrap_or((paths, paths));
        if host.is_empty() || guest.is_empty() {
            return Err(format!("expected `HOST[::GUEST][:ro]`, found `{text}`"));
        }
        Ok(Self { host: host.into(), guest: guest.into(), read_only })
    }
}

impl fmt::Display for DirGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.host.display())?;
        if Path::new(&self.guest) != self.host {
            write!(f, "::{}", self.guest)?;
        }
        if self.read_only { f.write_str(":ro") } else { Ok(()) }
    }
}

/// One `--env`: `NAME=VALUE`, or `NAME` to pass on what wrun itself was started with.
///
/// # Errors
/// Says what was expected, or that the variable to pass on is not set.
pub fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err(format!("expected `NAME=VALUE` or `NAME`, found `{text}`")),
        Some((name, value)) => Ok((name.into(), value.into())),
        None => match std::env::var(text) {
            Ok(value) => Ok((text.into(), value)),
            Err(std::env::VarError::NotPresent) => {
                Err(format!("`{text}` is to be passed on but is not set; give it a value: `{text}=VALUE`"))
            }
            Err(std::env::VarError::NotUnicode(_)) => Err(format!("the value of `{text}` is not UTF-8")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dir_grants_are_read_and_written() {
        let grant = |host: &str, guest: &str, read_only| DirGrant { host: host.into(), guest: guest.into(), read_only };
        for (text, expected) in [
            ("data", grant("data", "data", false)),
            ("data:ro", grant("data", "data", true)),
            ("/srv/in::/in:ro", grant("/srv/in", "/in", true)),
            ("a:b::c", grant("a:b", "c", false)),
        ] {
            assert_eq!(text.parse(), Ok(expected.clone()));
            assert_eq!(expected.to_string(), text);
        }
        for text in ["", "::", "a::", "::b", ":ro"] {
            assert!(text.parse::<DirGrant>().is_err(), "{text}");
        }
    }

    #[test]
    fn env_is_given_or_passed_on() {
        assert_eq!(parse_env("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_env("A="), Ok(("A".into(), String::new())));
        assert!(parse_env("=b").is_err());
        assert!(parse_env("WRUN_TEST_SURELY_NOT_SET").is_err_and(|error| error.contains("not set")));
    }
}
