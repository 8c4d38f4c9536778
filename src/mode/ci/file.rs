//! `wrun-ci.toml` as it is written: its tables and keys, and the schema of them.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use schemars::{JsonSchema, Schema, schema_for};
use serde::Deserialize;
use toml::{Spanned, de::DeValue};

use super::Profile as Chosen;
use crate::{
    grant::{HttpGrant, TcpGrant},
    limits::Bytes,
    settings::{Flaw, did_you_mean, duration, parse, parsed_some, read_table},
};

/// The version of the format that this program reads.
const VERSION: u32 = 1;

/// The largest job file, in bytes.
pub(super) const FILE_MAX: u64 = 8 << 20;

/// A job file.
#[derive(Debug, Default)]
pub(super) struct JobFile {
    /// The profile that was chosen and is there.
    pub(super) profile: Option<String>,
    pub(super) run: RunTable,
    pub(super) defaults: Shared,
    pub(super) jobs: Vec<Written>,
}

/// A job as it is written, and where.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) own: JobTable,
    pub(super) shared: Shared,
    pub(super) places: Places,
}

/// Where a table and its keys are in the text.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    pub(super) head: Range<usize>,
    keys: BTreeMap<String, Range<usize>>,
}

impl Places {
    /// Where the value of a key is; where the table is, when it has none.
    pub(super) fn of(&self, key: &str) -> Range<usize> {
        self.keys.get(key).unwrap_or(&self.head).clone()
    }
}

/// `[run]`: how jobs are run together.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RunTable {
    /// The name of the whole, as reports have it. Default: the name of the folder that the file is in.
    pub(super) name: Option<String>,
    /// How many jobs run at once: a number, or `num-cpus`, the default.
    pub(super) jobs: Option<Slots>,
    /// Whether no more jobs are started after one that failed, or after so many. Default false.
    pub(super) fail_fast: Option<FailFast>,
    /// How often a job that failed is tried again: a number, or a table. Default 0.
    pub(super) retries: Option<RetriesTable>,
    /// How often a job is tried again that wrun, and not its guest, is to blame for. Default 1.
    pub(super) infra_retries: Option<u32>,
    /// When a job is told to be slow.
    pub(super) slow: SlowTable,
    /// Of which jobs the last lines are shown. Default `failure`.
    pub(super) output: Option<Show>,
    /// The longest that all jobs together may take.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) total_timeout: Option<Duration>,
}

/// How many jobs run at once.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number of jobs, or `num-cpus`")]
pub(super) enum Slots {
    Number(u32),
    Word(SlotsWord),
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SlotsWord {
    NumCpus,
}

/// When no more jobs are started.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected `true`, `false` or `{ max-fail = 3 }`")]
pub(super) enum FailFast {
    Is(bool),
    After(MaxFail),
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct MaxFail {
    /// After so many failed jobs.
    pub(super) max_fail: u32,
}

/// How often a job is tried again.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected a number, or a table such as `{ count = 2, backoff = \"exponential\", delay = \"1s\" }`"
)]
pub(super) enum RetriesTable {
    Number(u32),
    Table(RetriesSpec),
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RetriesSpec {
    /// How often.
    pub(super) count: u32,
    /// Whether each pause is as long as the first, or twice as long as the one before it. Default `fixed`.
    pub(super) backoff: Backoff,
    /// The first pause. Default none.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) delay: Option<Duration>,
    /// The longest pause.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) max_delay: Option<Duration>,
    /// Whether a pause is made shorter at random, by up to half. Default false.
    pub(super) jitter: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backoff {
    #[default]
    Fixed,
    Exponential,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct SlowTable {
    /// How often a job that still runs is told of. Default 20 s.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) period: Option<Duration>,
    /// After how many periods a job is ended. Default: when its own `timeout` is over.
    pub(super) terminate_after: Option<u32>,
    /// How long its process may take to end then, before it is killed. Default 5 s.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) grace: Option<Duration>,
}

/// Of which jobs the last lines are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Show {
    /// Of those that failed, when all is over.
    #[default]
    Failure,
    /// Of each, when it has ended.
    Always,
    /// Of none.
    Never,
    /// Of each, when all is over.
    Final,
}

/// `[defaults]`, and what of it a job says for itself: what a guest may touch and spend.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Shared {
    /// What the guest is: `wasi:cli`, a command.
    pub(super) world: Option<String>,
    /// The most memory that it may have. Default 256MiB.
    #[serde(deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) memory: Option<Bytes>,
    /// How much fuel it may use. Default: as much as it likes.
    pub(super) fuel: Option<u64>,
    /// The longest that it may take. Default 60 s.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "Option<String>")]
    pub(super) timeout: Option<Duration>,
    /// Its stack. Default 512KiB.
    #[serde(deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) stack: Option<Bytes>,
    /// The most that it may print. Default 1MiB.
    #[serde(deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) stdout_max: Option<Bytes>,
    /// The same, of its standard error. Default 1MiB.
    #[serde(deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) stderr_max: Option<Bytes>,
    /// The most bytes of files that it may leave. Default 64MiB.
    #[serde(deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) files_max: Option<Bytes>,
    /// The most files that it may hold open. Default 64.
    pub(super) open_files: Option<u32>,
    /// The most threads that it may make. Default 0.
    pub(super) threads: Option<u32>,
    /// Whom it may connect to: `none`, the default, or `{ allow = ["api.example.com:443"] }`.
    pub(super) network: Option<NetworkTable>,
    /// What stands between it and the host: `jail`, the default, `process`, or `thread` for guests that are trusted.
    pub(super) isolation: Option<IsolationWord>,
    /// Its environment. It has no other.
    pub(super) env: BTreeMap<String, String>,
    /// Variables of wrun's own environment that it gets, too.
    pub(super) env_pass: Option<Vec<String>>,
    /// `real`.
    pub(super) clock: Option<String>,
    /// `real`.
    pub(super) random: Option<String>,
    /// `native`.
    pub(super) nan: Option<String>,
    /// `false`.
    pub(super) cache: Option<bool>,
    /// Not supported yet.
    pub(super) table_elements: Option<u64>,
}

/// Whom a guest may connect to.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected `none` or `{ allow = [\"api.example.com:443\"] }`")]
pub(super) enum NetworkTable {
    Word(NoNetwork),
    Allow(Allowed),
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum NoNetwork {
    None,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Allowed {
    /// Hosts with their ports, for TCP and HTTP.
    pub(super) allow: Vec<String>,
}

impl NetworkTable {
    /// The grants that it stands for.
    ///
    /// # Errors
    /// What was expected.
    pub(super) fn grants(&self) -> Result<(Vec<HttpGrant>, Vec<TcpGrant>), String> {
        let Self::Allow(Allowed { allow }) = self else { return Ok((vec![], vec![])) };
        let grants = allow.iter().map(|host| Ok((host.parse()?, host.parse()?)));
        grants.collect::<Result<Vec<_>, String>>().map(|grants| grants.into_iter().unzip())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum IsolationWord {
    Jail,
    Process,
    Thread,
}

/// `[[job]]`: one guest to be run, beside what it says of [`Shared`].
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct JobTable {
    /// Its name: small letters, digits, `-` and `_`, at most 64.
    pub(super) id: String,
    /// The guest's file. From the job file's folder, as all paths are; `${matrix.KEY}` stands for a value of the matrix in
    /// this and in most texts.
    pub(super) wasm: String,
    /// The SHA-256 that the file must have.
    #[serde(default)]
    pub(super) sha256: Option<String>,
    /// Its arguments. `${attempt}` stands for the number of the attempt, from 1, here, in `env` and in a text
    /// of `stdin`.
    #[serde(default)]
    pub(super) args: Vec<String>,
    /// Its standard input: `{ file = "in.json" }` or `{ text = "…" }`. Default none.
    #[serde(default)]
    pub(super) stdin: Option<StdinTable>,
    /// Files and folders that it gets a copy of.
    #[serde(default)]
    pub(super) inputs: Vec<InputTable>,
    /// Folders that it may write to, and that are kept.
    #[serde(default)]
    pub(super) outputs: Vec<OutputTable>,
    /// Jobs that end before it starts.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) needs: Vec<Spanned<String>>,
    /// How those must have ended. Default `success`.
    #[serde(default)]
    pub(super) when: When,
    /// Words by which it can be selected.
    #[serde(default)]
    pub(super) tags: Vec<String>,
    /// Values, with each combination of which it is run; combinations in `exclude` are left out.
    #[serde(default)]
    pub(super) matrix: Option<MatrixTable>,
    /// How it must end.
    #[serde(default)]
    pub(super) expect: ExpectTable,
    /// Variables of wrun's own environment that it gets, and that no report shows.
    #[serde(default)]
    pub(super) secrets: Vec<String>,
    /// Whether all is well even when it fails. Default false.
    #[serde(default)]
    pub(super) allow_failure: bool,
    /// Jobs with the same word here never run at the same time.
    #[serde(default)]
    pub(super) serial: Option<String>,
    /// How often it is tried again, instead of what `[run]` says.
    #[serde(default)]
    pub(super) retries: Option<RetriesTable>,
    /// `none`.
    #[serde(default)]
    pub(super) protocol: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StdinTable {
    /// A file's content.
    File(String),
    /// This text.
    Text(String),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct InputTable {
    /// A file or a folder.
    pub(super) from: String,
    /// Its name in the guest.
    pub(super) to: String,
    /// Whether the guest may write to its copy. Default `ro`.
    #[serde(default)]
    pub(super) mode: Mode,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    #[default]
    Ro,
    Rw,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OutputTable {
    /// A folder's name in the guest, empty at first.
    pub(super) from: String,
    /// Where its files go.
    pub(super) to: String,
    /// The most bytes of them. Default: `files-max` of the job.
    #[serde(default, deserialize_with = "parsed_some")]
    #[schemars(with = "Option<String>")]
    pub(super) max: Option<Bytes>,
    /// Whether the job fails when it leaves none there. Default false.
    #[serde(default)]
    pub(super) required: bool,
}

/// How the jobs that a job needs must have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum When {
    /// All well.
    #[default]
    Success,
    /// In whatever way.
    Always,
    /// At least one not well.
    Failure,
}

/// Values of a matrix.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
pub(super) struct MatrixTable {
    #[serde(default)]
    pub(super) exclude: Vec<BTreeMap<String, Scalar>>,
    #[serde(flatten)]
    pub(super) axes: BTreeMap<String, Vec<Scalar>>,
}

#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a text, a number or a truth value")]
pub(super) enum Scalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ExpectTable {
    /// Its exit code. Default 0.
    pub(super) exit: i32,
    /// A file that has what it prints.
    pub(super) stdout: Option<String>,
    /// The most fuel that a good run uses.
    pub(super) fuel_max: Option<u64>,
    /// Not supported yet.
    pub(super) fuel_tolerance: Option<String>,
}

/// `[profile.NAME]`: what is otherwise where that profile is chosen.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Profile {
    /// Instead of what `[run]` says.
    run: RunTable,
    /// Instead of what `[defaults]` says.
    defaults: Shared,
}

/// All of it, for its schema.
#[derive(JsonSchema)]
#[schemars(title = "wrun-ci.toml", deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is used")]
struct Whole {
    /// The version of the format: 1.
    version: u32,
    /// How jobs are run together.
    run: Option<RunTable>,
    /// What each job has that does not say otherwise.
    defaults: Option<Shared>,
    /// The jobs.
    job: Option<Vec<JobTable>>,
    /// What is otherwise with `--profile NAME`; that of the name `ci` is chosen where `CI=true`.
    profile: Option<BTreeMap<String, Profile>>,
}

/// The names of the keys of a table.
fn keys_of(schema: &Schema) -> Vec<String> {
    let properties = schema.get("properties").and_then(|properties| properties.as_object());
    properties.map(|properties| properties.keys().cloned().collect()).unwrap_or_default()
}

/// A JSON Schema of the file.
pub(super) fn schema() -> serde_json::Value {
    let mut whole = schema_for!(Whole).to_value();
    let shared = whole["$defs"]["Shared"]["properties"].clone();
    if let (Some(shared), Some(job)) = (shared.as_object(), whole["$defs"]["JobTable"]["properties"].as_object_mut()) {
        job.extend(shared.clone());
    }
    whole
}

impl JobFile {
    /// Reads a file as it is with a profile.
    ///
    /// # Errors
    /// All that is wrong, and where.
    pub(super) fn read(text: &str, profile: Option<&Chosen>) -> Result<Self, Vec<Flaw>> {
        let (table, mut flaws) = parse(text);
        let span = table.span();
        let mut table = table.into_inner();
        if let Err(flaw) = version(text, table.remove("version")) {
            flaws.push(flaw);
            // nobody knows what the rest of another version means
            if table.is_empty() || flaws.len() == 1 && flaws[0].message.starts_with("this wrun reads") {
                return Err(flaws);
            }
        }
        let mut file = Self::default();
        if let Some(run) = table.remove("run").and_then(|value| as_table(text, value, &mut flaws)) {
            file.run = read_table(text, run, &mut flaws).unwrap_or_default();
        }
        if let Some(defaults) = table.remove("defaults").and_then(|value| as_table(text, value, &mut flaws)) {
            file.defaults = read_table(text, defaults, &mut flaws).unwrap_or_default();
        }
        let mut known = vec![];
        if let Some(profiles) = table.remove("profile").and_then(|value| as_table(text, value, &mut flaws)) {
            for (name, value) in profiles.into_inner() {
                let Some(read) = as_table(text, value, &mut flaws) else { continue };
                let read: Profile = read_table(text, read, &mut flaws).unwrap_or_default();
                if profile.is_some_and(|profile| **name.get_ref() == profile.name) {
                    file.profile = Some(name.get_ref().to_string());
                    file.run.replace(read.run);
                    file.defaults = read.defaults.or(&file.defaults);
                }
                known.push(name.get_ref().to_string());
            }
        }
        if let Some(Chosen { name, required: true }) = profile
            && file.profile.is_none()
        {
            let near = did_you_mean(name, known.iter().map(String::as_str));
            flaws.push(Flaw::of_all(format!("expected a `[profile.{name}]`, found none{near}")));
        }
        file.jobs = jobs(text, table.remove("job"), &mut flaws);
        for (key, _) in table {
            let near = did_you_mean(key.get_ref(), ["version", "run", "defaults", "job", "profile"].into_iter());
            let message = format!("unknown field `{}`{near}", key.get_ref());
            flaws.push(Flaw::at(text, key.span(), message));
        }
        if file.jobs.is_empty() && flaws.is_empty() {
            flaws.push(Flaw::at(text, span, "expected at least one `[[job]]`".into()));
        }
        if flaws.is_empty() { Ok(file) } else { Err(flaws) }
    }
}

fn version(text: &str, version: Option<Spanned<DeValue<'_>>>) -> Result<(), Flaw> {
    let Some(version) = version else {
        return Err(Flaw::of_all(format!("expected `version = {VERSION}`, found no `version`")));
    };
    let number = match version.get_ref() {
        DeValue::Integer(number) => u32::from_str_radix(number.as_str(), number.radix()).ok(),
        _ => None,
    };
    match number {
        Some(VERSION) => Ok(()),
        Some(other) => {
            let message = format!("this wrun reads version {VERSION} of the format, found version {other}");
            Err(Flaw::at(text, version.span(), message))
        }
        None => Err(Flaw::at(text, version.span(), format!("expected `version = {VERSION}`"))),
    }
}

fn as_table<'a>(
    text: &str,
    value: Spanned<DeValue<'a>>,
    flaws: &mut Vec<Flaw>,
) -> Option<Spanned<toml::de::DeTable<'a>>> {
    let span = value.span();
    if let DeValue::Table(table) = value.into_inner() {
        return Some(Spanned::new(span, table));
    }
    flaws.push(Flaw::at(text, span, "expected a table".into()));
    None
}

fn jobs(text: &str, value: Option<Spanned<DeValue<'_>>>, flaws: &mut Vec<Flaw>) -> Vec<Written> {
    let Some(value) = value else { return vec![] };
    let span = value.span();
    let DeValue::Array(array) = value.into_inner() else {
        flaws.push(Flaw::at(text, span, "expected `[[job]]`".into()));
        return vec![];
    };
    let (of_shared, of_job) = (keys_of(&schema_for!(Shared)), keys_of(&schema_for!(JobTable)));
    let mut jobs = vec![];
    for value in array {
        let Some(table) = as_table(text, value, flaws) else { continue };
        let span = table.span();
        let mut places = Places { head: span.clone(), keys: BTreeMap::new() };
        let (mut own, mut shared) = (toml::de::DeTable::new(), toml::de::DeTable::new());
        for (key, value) in table.into_inner() {
            let name = key.get_ref().to_string();
            places.keys.insert(name.clone(), value.span());
            if of_shared.contains(&name) {
                shared.insert(key, value);
            } else if of_job.contains(&name) {
                own.insert(key, value);
            } else {
                let near = did_you_mean(&name, of_job.iter().chain(&of_shared).map(String::as_str));
                flaws.push(Flaw::at(text, key.span(), format!("unknown field `{name}`{near}")));
            }
        }
        let shared = read_table(text, Spanned::new(span.clone(), shared), flaws).unwrap_or_default();
        if let Some(own) = read_table(text, Spanned::new(span, own), flaws) {
            jobs.push(Written { own, shared, places });
        }
    }
    jobs
}

impl RunTable {
    /// Takes what another one says.
    fn replace(&mut self, other: Self) {
        let Self { name, jobs, fail_fast, retries, infra_retries, slow, output, total_timeout } = other;
        self.name = name.or_else(|| self.name.take());
        self.jobs = jobs.or(self.jobs);
        self.fail_fast = fail_fast.or(self.fail_fast);
        self.retries = retries.or_else(|| self.retries.take());
        self.infra_retries = infra_retries.or(self.infra_retries);
        self.slow.period = slow.period.or(self.slow.period);
        self.slow.terminate_after = slow.terminate_after.or(self.slow.terminate_after);
        self.slow.grace = slow.grace.or(self.slow.grace);
        self.output = output.or(self.output);
        self.total_timeout = total_timeout.or(self.total_timeout);
    }
}

impl Shared {
    /// What this says, and of what it does not say what `other` does. Tables are merged.
    pub(super) fn or(self, other: &Self) -> Self {
        let mut env = other.env.clone();
        env.extend(self.env);
        Self {
            world: self.world.or_else(|| other.world.clone()),
            memory: self.memory.or(other.memory),
            fuel: self.fuel.or(other.fuel),
            timeout: self.timeout.or(other.timeout),
            stack: self.stack.or(other.stack),
            stdout_max: self.stdout_max.or(other.stdout_max),
            stderr_max: self.stderr_max.or(other.stderr_max),
            files_max: self.files_max.or(other.files_max),
            open_files: self.open_files.or(other.open_files),
            threads: self.threads.or(other.threads),
            network: self.network.or_else(|| other.network.clone()),
            isolation: self.isolation.or(other.isolation),
            env,
            env_pass: self.env_pass.or_else(|| other.env_pass.clone()),
            clock: self.clock.or_else(|| other.clock.clone()),
            random: self.random.or_else(|| other.random.clone()),
            nan: self.nan.or_else(|| other.nan.clone()),
            cache: self.cache.or(other.cache),
            table_elements: self.table_elements.or(other.table_elements),
        }
    }
}
