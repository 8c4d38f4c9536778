//! `NAME.toml`: what an app may touch and spend, where it is, and how it is run. Names are those of the command's flags.

use std::{collections::BTreeMap, path::Path, time::Duration};

use serde::Deserialize;

use crate::{
    child::{At, ROUTE_MAX, RunConfig},
    grant::{DirGrant, Grants, HttpGrant, TcpGrant},
    limits::Bytes,
    message::Message,
    mode::cluster::{Builder, InstanceLife},
    settings::{Flaw, duration, parsed_all, parsed_some, read},
};

/// The most that a command may print for one request, unless its file says otherwise.
const STDOUT_MAX: Bytes = Bytes::mib(16);

/// What the file of an app says.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Settings {
    /// Whether it is served at all.
    pub(super) disabled: bool,
    /// How many workers it has.
    workers: Option<u32>,
    /// Whether it is started by the first request.
    pub(super) lazy: Option<bool>,
    /// Under which path it is.
    route: Option<String>,
    /// Or, to which host its requests are sent.
    host: Option<String>,
    /// What answers requests.
    mode: Mode,
    /// The arguments of a command.
    args: Vec<String>,
    /// The most that a command may print for one of them.
    #[serde(deserialize_with = "parsed_some")]
    stdout_max: Option<Bytes>,
    /// What a command prints.
    content_type: Option<String>,
    /// What an instance lives for.
    instance: Option<Life>,
    reuse: Option<u64>,
    concurrency: Option<u32>,
    queue: Option<u32>,
    probe: Option<String>,
    max_requests: Option<u64>,
    #[serde(deserialize_with = "parsed_some")]
    max_memory: Option<Bytes>,
    #[serde(deserialize_with = "duration")]
    grace: Option<Duration>,
    data: Option<toml::Value>,
    env: BTreeMap<String, String>,
    #[serde(deserialize_with = "parsed_all")]
    dir: Vec<DirGrant>,
    #[serde(deserialize_with = "parsed_all")]
    http: Vec<HttpGrant>,
    #[serde(deserialize_with = "parsed_all")]
    tcp: Vec<TcpGrant>,
    #[serde(deserialize_with = "duration")]
    timeout: Option<Duration>,
    #[serde(deserialize_with = "parsed_some")]
    memory: Option<Bytes>,
    #[serde(deserialize_with = "parsed_some")]
    stack: Option<Bytes>,
    #[serde(deserialize_with = "parsed_some")]
    message_max: Option<Bytes>,
    #[serde(deserialize_with = "parsed_some")]
    file_size: Option<Bytes>,
    fuel: Option<u64>,
    open_files: Option<u32>,
}

/// What answers requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    /// What the guest exports for that.
    #[default]
    Serve,
    /// A run of it as a command, for each.
    Command,
}

/// What an instance lives for.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Life {
    Worker,
    Task,
}

impl Settings {
    /// Reads them.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub(super) fn read(text: &str) -> Result<Self, Flaw> {
        let settings: Self = read(text)?;
        if let Some(workers) = settings.workers.filter(|workers| !(1..=1024).contains(workers)) {
            return Err(Flaw::of_key(text, "workers", format!("expected 1 to 1024 `workers`, found {workers}")));
        }
        let is_command = settings.mode == Mode::Command;
        let of_commands = [
            ("args", !settings.args.is_empty()),
            ("stdout-max", settings.stdout_max.is_some()),
            ("content-type", settings.content_type.is_some()),
        ];
        if let Some((key, _)) = of_commands.into_iter().find(|(_, is_given)| *is_given && !is_command) {
            return Err(Flaw::of_key(text, key, format!("`{key}` is for `mode = \"command\"`")));
        }
        if is_command && (settings.instance.is_some() || settings.reuse.is_some()) {
            let key = if settings.instance.is_some() { "instance" } else { "reuse" };
            return Err(Flaw::of_key(
                text,
                key,
                format!("a command has one run for each request: expected no `{key}`"),
            ));
        }
        if settings.content_type.as_ref().is_some_and(|kind| !kind.bytes().all(|byte| (b' '..0x7f).contains(&byte))) {
            return Err(Flaw::of_key(text, "content-type", "expected a `content-type` such as `application/json`"));
        }
        if settings.route.is_some() && settings.host.is_some() {
            return Err(Flaw::of_key(text, "host", "expected a `route` or a `host`, found both"));
        }
        Ok(settings)
    }

    /// Whether a run of a command answers its requests.
    pub(super) fn is_command(&self) -> bool {
        self.mode == Mode::Command
    }

    /// Where the app of this name is, whose settings this text has.
    ///
    /// # Errors
    /// What was expected.
    pub(super) fn at(&self, name: &str, text: &str) -> Result<At, Flaw> {
        if let Some(host) = &self.host {
            let is_host = |c: char| c.is_ascii_alphanumeric() || "-.:[]".contains(c);
            if host.is_empty() || host.len() > ROUTE_MAX || !host.chars().all(is_host) {
                let message = format!("expected a `host` such as `shop.example`, found `{host}`");
                return Err(Flaw::of_key(text, "host", message));
            }
            return Ok(At::Host(host.to_ascii_lowercase()));
        }
        let Some(route) = &self.route else { return Ok(At::Path(format!("/{name}"))) };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-._~!$&'()*+,;=:@%".contains(c);
        let is_path = route.starts_with('/') && (route == "/" || !route.ends_with('/')) && !route.contains("//");
        if !is_path || route.len() > ROUTE_MAX || !route.chars().all(is_plain) {
            let expected = format!("a `route` such as `/` or `/shop/api`, of at most {ROUTE_MAX} letters");
            return Err(Flaw::of_key(text, "route", format!("expected {expected}, found `{route}`")));
        }
        Ok(At::Path(route.clone()))
    }

    /// What is as they, or this text of them, say in a pool that was made otherwise; folders are meant from `folder` on.
    ///
    /// # Errors
    /// What was expected.
    pub(super) fn apply(&self, text: &str, mut builder: Builder, folder: &Path) -> Result<Builder, Flaw> {
        let mut limits = builder.current_limits().clone();
        if let Some(timeout) = self.timeout {
            limits.timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
        }
        limits.memory = self.memory.unwrap_or(limits.memory);
        limits.stack = self.stack.unwrap_or(limits.stack);
        limits.message_max = self.message_max.unwrap_or(limits.message_max);
        limits.file_size = self.file_size.unwrap_or(limits.file_size);
        limits.fuel = self.fuel.or(limits.fuel);
        limits.open_files = self.open_files.unwrap_or(limits.open_files);
        if !(Bytes::kib(16)..=Bytes::mib(256)).contains(&limits.stack) {
            let message = format!("expected 16KiB to 256MiB for the `stack`, found {}", limits.stack);
            return Err(Flaw::of_key(text, "stack", message));
        }
        let message = |data: &toml::Value| {
            Message::of(data)
                .map_err(|error| Flaw::of_key(text, "data", format!("expected `data` that is JSON, but {error}")))
        };
        if let Some(data) = self.data.as_ref().map(message).transpose()? {
            builder = builder.data(data);
        }
        let in_folder = |dir: &DirGrant| DirGrant { host: folder.join(&dir.host), ..dir.clone() };
        builder = builder.limits(limits).grants(Grants {
            dirs: self.dir.iter().map(in_folder).collect(),
            env: self.env.clone().into_iter().collect(),
            http: self.http.clone(),
            tcp: self.tcp.clone(),
        });
        if self.mode == Mode::Command {
            let (stdout_max, content_type) = (self.stdout_max.unwrap_or(STDOUT_MAX), self.content_type.clone());
            builder = builder.with_command(RunConfig { args: self.args.clone(), stdout_max, content_type });
        }
        if let Some(workers) = self.workers {
            builder = builder.workers(workers);
        }
        if let Some(life) = self.instance {
            builder = builder.instance(match life {
                Life::Worker => InstanceLife::Worker,
                Life::Task => InstanceLife::Task,
            });
        }
        if let Some(uses) = self.reuse {
            builder = builder.reuse(uses);
        }
        if let Some(tasks) = self.concurrency {
            builder = builder.concurrency(tasks);
        }
        if let Some(tasks) = self.queue {
            builder = builder.queue(tasks as usize);
        }
        if let Some(path) = &self.probe {
            builder = builder.probe(path);
        }
        if let Some(requests) = self.max_requests {
            builder = builder.requests_max(requests);
        }
        if let Some(memory) = self.max_memory {
            builder = builder.process_memory_max(memory);
        }
        if let Some(time) = self.grace {
            builder = builder.grace(time);
        }
        Ok(builder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_is_where_its_settings_say() {
        let at = |text: &str| Settings::read(text).and_then(|settings| settings.at("shop", text));
        assert_eq!(at(""), Ok(At::Path("/shop".into())));
        assert_eq!(at("route = '/'"), Ok(At::Path("/".into())));
        assert_eq!(at("route = '/a/b'"), Ok(At::Path("/a/b".into())));
        assert_eq!(at("host = 'Shop.Example'"), Ok(At::Host("shop.example".into())));
        for text in [
            "route = ''",
            "route = 'a'",
            "route = '/a/'",
            "route = '/a//b'",
            "route = '/a?b'",
            "host = ''",
            "host = 'a b'",
            "route = '/a'\nhost = 'b'",
        ] {
            assert!(at(text).is_err_and(|flaw| flaw.message.starts_with("expected")), "{text}");
        }
    }

    #[test]
    fn what_is_no_setting_is_told_with_its_place() {
        let flaw = |text: &str| Settings::read(text).expect_err("a flaw").to_string();
        let unknown = flaw("workers = 2\ntimeuot = '1s'\n");
        assert!(unknown.starts_with("line 2, column 1: unknown field `timeuot`"), "{unknown}");
        assert!(unknown.contains("did you mean `timeout`?") && unknown.ends_with("^^^^^^^"), "{unknown}");
        let workers = flaw("lazy = true\nworkers = 0\n");
        assert!(workers.starts_with("line 2, column 11: expected 1 to 1024 `workers`, found 0\n"), "{workers}");
        assert!(flaw("args = ['a']").starts_with("line 1, column 8: `args` is for `mode = \"command\"`"));
        assert!(flaw("mode = 'command'\nreuse = 3").starts_with("line 2, column 9: a command has one run"));
        let text = "memory = '1MiB'\nroute = 'x'";
        let route = Settings::read(text).and_then(|settings| settings.at("shop", text)).expect_err("a flaw");
        assert!(route.to_string().starts_with("line 2, column 9: expected a `route` such as"), "{route}");
        assert!(flaw("instance = 'tsak'").contains("did you mean `task`?"));
        assert!(flaw("timeout = 5").contains("line 1, column 11"));
        assert!(flaw("dir = ['::']").contains("expected `HOST[::GUEST][:ro]`"));
        assert!(flaw("tcp = ['nowhere']").contains("line 1"));
    }
}
