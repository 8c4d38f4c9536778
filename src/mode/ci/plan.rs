//! What a job file comes to: the cells of matrices as jobs of their own, what they need, and all that they have by default.
//! Nothing of the file system is looked at but where it says so.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use super::{
    file::{
        Backoff, ExpectTable, FailFast, IsolationWord, JobFile, MatrixTable, MaxFail, Mode, NetworkTable, RetriesTable,
        RunTable, Scalar, Shared, Show, Slots, StdinTable, When, Written,
    },
    graph, stage,
};
use crate::{
    child::cores,
    grant::{HttpGrant, TcpGrant},
    limits::{Bytes, Limits},
    process::Isolation,
    settings::{Flaw, did_you_mean},
};

/// The most cells of one matrix.
const CELLS_MAX: usize = 256;

/// The most jobs that run at once.
const SLOTS_MAX: u32 = 1024;

/// Longer than this no name is.
const NAME_MAX: usize = 64;

/// No time is longer than this: a clock could not tell when it is over.
const LONGEST: Duration = Duration::from_hours(24 * 365 * 100);

/// How long a job may take that says nothing else.
const TIMEOUT: Duration = Duration::from_mins(1);

/// All that is to be run, and how.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    /// The profile that was chosen.
    pub(super) profile: Option<String>,
    pub(super) run: RunSettings,
    /// In the order of the file, the cells of a matrix in that of its values.
    pub(super) jobs: Vec<Job>,
}

/// How jobs are run together.
#[derive(Debug, Clone)]
pub(super) struct RunSettings {
    pub(super) slots: u32,
    /// After how many failures no more jobs are started.
    pub(super) max_fail: Option<u32>,
    pub(super) retries: Retries,
    pub(super) infra_retries: u32,
    pub(super) slow_period: Duration,
    pub(super) terminate_after: Option<u32>,
    pub(super) grace: Duration,
    pub(super) show: Show,
    pub(super) total_timeout: Option<Duration>,
}

/// How often a job is tried again, and when.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Retries {
    pub(super) count: u32,
    exponential: bool,
    delay: Duration,
    max_delay: Option<Duration>,
    jitter: bool,
}

impl Retries {
    /// The same pause each time, which is none.
    pub(super) fn times(count: u32) -> Self {
        Self { count, ..Self::default() }
    }

    /// How long to wait before the attempt after that one; `chance` is between 0 and 1.
    pub(super) fn pause(&self, attempt: u32, chance: f64) -> Duration {
        let factor = if self.exponential { 1 << attempt.saturating_sub(1).min(20) } else { 1 };
        let pause = self.delay.saturating_mul(factor).min(LONGEST);
        let pause = self.max_delay.map_or(pause, |max| pause.min(max));
        if self.jitter { pause.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 2.0) } else { pause }
    }
}

/// One job.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) id: String,
    /// Its id, and its cell of the matrix.
    pub(super) name: String,
    /// The line in which it begins.
    pub(super) line: usize,
    pub(super) wasm: PathBuf,
    /// As it is written.
    pub(super) wasm_text: String,
    pub(super) sha256: Option<String>,
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) env_pass: Vec<String>,
    pub(super) secrets: Vec<String>,
    pub(super) stdin: Option<Stdin>,
    pub(super) inputs: Vec<Input>,
    pub(super) outputs: Vec<Output>,
    pub(super) needs: Vec<usize>,
    pub(super) when: When,
    pub(super) tags: Vec<String>,
    pub(super) expect: Expect,
    pub(super) allow_failure: bool,
    pub(super) serial: Option<String>,
    pub(super) retries: Retries,
    pub(super) limits: Limits,
    pub(super) stdout_max: Bytes,
    pub(super) stderr_max: Bytes,
    pub(super) files_max: Bytes,
    pub(super) http: Vec<HttpGrant>,
    pub(super) tcp: Vec<TcpGrant>,
    pub(super) isolation: Isolation,
    /// Where the keys are that name files.
    pub(super) places: HashMap<&'static str, Range<usize>>,
}

/// Where a job's standard input comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stdin {
    File(PathBuf),
    Text(String),
}

/// A file or a folder that a job gets a copy of.
#[derive(Debug, Clone)]
pub(super) struct Input {
    pub(super) from: PathBuf,
    /// Its path in the guest.
    pub(super) to: String,
    pub(super) is_writable: bool,
}

/// A folder that a job writes to.
#[derive(Debug, Clone)]
pub(super) struct Output {
    /// Its path in the guest.
    pub(super) from: String,
    pub(super) to: PathBuf,
    pub(super) max: Bytes,
    pub(super) required: bool,
}

/// How a job must end.
#[derive(Debug, Clone, Default)]
pub(super) struct Expect {
    pub(super) exit: i32,
    pub(super) stdout: Option<PathBuf>,
    pub(super) fuel_max: Option<u64>,
}

/// What is chosen of a matrix, in the order of its keys.
type Cell = Vec<(String, Scalar)>;

impl Plan {
    /// Makes a plan of what a file says, whose text it is and whose folder.
    ///
    /// # Errors
    /// All that is wrong, and where.
    pub(super) fn of(file: JobFile, text: &str, folder: &Path) -> Result<Self, Vec<Flaw>> {
        let line_ends = memchr::memchr_iter(b'\n', text.as_bytes()).collect();
        let mut planner = Planner { text, line_ends, folder, flaws: vec![] };
        let run = planner.run(&file.run);
        let mut ids = HashMap::<String, Vec<usize>>::new();
        let (mut jobs, mut needs) = (vec![], vec![]);
        for written in &file.jobs {
            let id = &written.own.id;
            if ids.contains_key(id) {
                planner.flaw(written.places.of("id"), format!("there is another job of the id `{id}`"));
                continue;
            }
            let cells = planner.cells(written);
            let first = jobs.len();
            for cell in cells {
                jobs.push(planner.job(written, &cell, &file.defaults, run.retries));
                needs.push(&written.own.needs);
            }
            ids.insert(id.clone(), (first..jobs.len()).collect());
        }
        for (at, needs) in needs.into_iter().enumerate() {
            for need in needs {
                if let Some(all) = ids.get(need.get_ref()) {
                    jobs[at].needs.extend(all);
                } else {
                    let near = did_you_mean(need.get_ref(), ids.keys().map(String::as_str));
                    planner.flaw(need.span(), format!("there is no job of the id `{}`{near}", need.get_ref()));
                }
            }
            jobs[at].needs.sort_unstable();
            jobs[at].needs.dedup();
        }
        let edges: Vec<_> = jobs.iter().map(|job| job.needs.clone()).collect();
        if let Some(cycle) = graph::cycle(&edges) {
            let names: Vec<_> = cycle.iter().chain(cycle.first()).map(|at| jobs[*at].name.as_str()).collect();
            let place = jobs[cycle[0]].places["needs"].clone();
            planner.flaw(place, format!("jobs wait for each other: {}", names.join(" -> ")));
        }
        planner.check_cells(&jobs);
        planner.check_outputs(&jobs);
        let mut flaws = planner.flaws;
        if !flaws.is_empty() {
            // each cell of a matrix has the same
            once(&mut flaws);
            return Err(flaws);
        }
        let name = file.run.name.unwrap_or_else(|| {
            let folder = folder.file_name().map(|name| name.to_string_lossy().into_owned());
            folder.unwrap_or_else(|| "jobs".into())
        });
        Ok(Self { name, profile: file.profile, run, jobs })
    }

    /// Sees that the files are there that jobs are made of.
    pub(super) fn check_files(&self, text: &str) -> Vec<Flaw> {
        let made = || self.jobs.iter().flat_map(|job| &job.outputs).map(|output| &*output.to);
        let (whole, parts): (HashSet<_>, HashSet<_>) = (made().collect(), made().flat_map(Path::ancestors).collect());
        // another job may make it, what it lies in, or what lies in it
        let is_made = |path: &Path| parts.contains(path) || path.ancestors().any(|path| whole.contains(path));
        let mut flaws = vec![];
        for job in &self.jobs {
            let mut expected = |key: &'static str, what: &str, path: &Path| {
                // what is read as a whole must have an end
                let is_wrong = what == "a file" && path.exists() && !path.is_file();
                if is_wrong || !path.exists() && !is_made(path) {
                    let found = if is_wrong { "something else" } else { "none" };
                    let message = format!("expected {what} at `{}`, found {found}", path.display());
                    flaws.push(Flaw::at(text, job.places[key].clone(), message));
                }
            };
            expected("wasm", "a guest", &job.wasm);
            if let Some(Stdin::File(path)) = &job.stdin {
                expected("stdin", "a file", path);
            }
            if let Some(path) = &job.expect.stdout {
                expected("expect", "a file", path);
            }
            for input in &job.inputs {
                expected("inputs", "a file or a folder", &input.from);
            }
            for input in job.inputs.iter().filter(|input| input.from.exists() && !is_made(&input.from)) {
                if let Err(message) = stage::check_input(&input.from) {
                    flaws.push(Flaw::at(text, job.places["inputs"].clone(), message));
                }
            }
        }
        once(&mut flaws);
        flaws
    }
}

/// Leaves each flaw once.
fn once(flaws: &mut Vec<Flaw>) {
    let mut seen = HashSet::new();
    flaws.retain(|flaw| seen.insert((flaw.line, flaw.column, flaw.message.clone())));
}

/// Makes a plan, and notes what is wrong.
struct Planner<'a> {
    text: &'a str,
    line_ends: Vec<usize>,
    folder: &'a Path,
    flaws: Vec<Flaw>,
}

impl Planner<'_> {
    fn flaw(&mut self, place: Range<usize>, message: impl Into<String>) {
        self.flaws.push(Flaw::at(self.text, place, message.into()));
    }

    fn run(&mut self, table: &RunTable) -> RunSettings {
        let slots = match table.jobs {
            Some(Slots::Number(number)) => number,
            Some(Slots::Word(_)) | None => cores(),
        };
        if !(1..=SLOTS_MAX).contains(&slots) {
            self.flaws.push(Flaw::of_all(format!("expected 1 to {SLOTS_MAX} `jobs` in `[run]`, found {slots}")));
        }
        let is_nothing = table.total_timeout.is_some_and(|total| total.is_zero());
        if is_nothing || matches!(table.fail_fast, Some(FailFast::After(MaxFail { max_fail: 0 }))) {
            self.flaws.push(Flaw::of_all("expected more than nothing for `total-timeout` and `max-fail` in `[run]`"));
        }
        let slow_period = table.slow.period.unwrap_or(Duration::from_secs(20)).min(LONGEST);
        if slow_period.is_zero() || table.slow.terminate_after == Some(0) {
            self.flaws.push(Flaw::of_all("expected more than nothing for `period` and `terminate-after` in `slow`"));
        }
        RunSettings {
            slots,
            max_fail: match table.fail_fast {
                None | Some(FailFast::Is(false)) => None,
                Some(FailFast::Is(true)) => Some(1),
                Some(FailFast::After(MaxFail { max_fail })) => Some(max_fail.max(1)),
            },
            retries: table.retries.as_ref().map(retries).unwrap_or_default(),
            infra_retries: table.infra_retries.unwrap_or(1),
            slow_period,
            terminate_after: table.slow.terminate_after,
            grace: table.slow.grace.unwrap_or(Duration::from_secs(5)).min(LONGEST),
            show: table.output.unwrap_or_default(),
            total_timeout: table.total_timeout.map(|total| total.min(LONGEST)),
        }
    }

    /// The cells of a job's matrix: one that is empty when it has none.
    fn cells(&mut self, job: &Written) -> Vec<Cell> {
        let Some(MatrixTable { axes, exclude }) = &job.own.matrix else { return vec![vec![]] };
        let place = job.places.of("matrix");
        let count = axes.values().map(Vec::len).try_fold(1usize, usize::checked_mul);
        if axes.is_empty() || count.is_none_or(|count| count == 0 || count > CELLS_MAX) {
            let found = count.map_or_else(|| "too many".into(), |count| count.to_string());
            let found = if axes.is_empty() { "0".into() } else { found };
            self.flaw(place, format!("expected a matrix of 1 to {CELLS_MAX} cells, found {found}"));
            return vec![vec![]];
        }
        for excluded in exclude {
            if let Some(key) = excluded.keys().find(|key| !axes.contains_key(*key)) {
                let near = did_you_mean(key, axes.keys().map(String::as_str));
                self.flaw(place.clone(), format!("`exclude` names `{key}`, which the matrix does not have{near}"));
            }
        }
        let mut cells: Vec<Cell> = vec![vec![]];
        for (key, values) in axes {
            let longer = |cell: &Cell| {
                let with = |value: &Scalar| cell.iter().cloned().chain([(key.clone(), value.clone())]).collect();
                values.iter().map(with).collect::<Vec<Cell>>()
            };
            cells = cells.iter().flat_map(longer).collect();
        }
        cells.retain(|cell| {
            let matches = |excluded: &BTreeMap<String, Scalar>| {
                excluded.iter().all(|(key, value)| cell.iter().any(|(k, v)| k == key && v == value))
            };
            !exclude.iter().any(matches)
        });
        cells
    }

    fn job(&mut self, written: &Written, cell: &Cell, defaults: &Shared, retries_of_run: Retries) -> Job {
        let (own, places) = (&written.own, &written.places);
        let shared = written.shared.clone().or(defaults);
        self.check_words(written, &shared);
        let name = name_of(&own.id, cell);
        let place = |key: &str| (places.of(key), &*own.id, cell);
        let args = own.args.iter().map(|text| self.fill(place("args"), text, true)).collect();
        let env = shared.env.iter().map(|(name, text)| (name.clone(), self.fill(place("env"), text, true))).collect();
        let stdin = own.stdin.as_ref().map(|stdin| match stdin {
            StdinTable::File(path) => Stdin::File(self.folder.join(self.fill(place("stdin"), path, false))),
            StdinTable::Text(text) => Stdin::Text(self.fill(place("stdin"), text, true)),
        });
        let mut fill = |key: &str, text: &str| self.fill(place(key), text, false);
        let wasm_text = fill("wasm", &own.wasm);
        let inputs =
            own.inputs.iter().map(|input| (fill("inputs", &input.from), fill("inputs", &input.to), input.mode));
        let inputs: Vec<_> = inputs.collect();
        let outputs =
            own.outputs.iter().map(|output| (fill("outputs", &output.from), fill("outputs", &output.to), output));
        let outputs: Vec<_> = outputs.collect();
        let expected = own.expect.stdout.as_ref().map(|path| fill("expect", path));
        let files_max = shared.files_max.unwrap_or(Bytes::mib(64));
        let limits = self.limits(written, &shared, files_max);
        let (http, tcp) = match shared.network.as_ref().map(NetworkTable::grants).transpose() {
            Ok(grants) => grants.unwrap_or_default(),
            Err(message) => {
                self.flaw(places.of("network"), message);
                (vec![], vec![])
            }
        };
        let folder = self.folder;
        let here = |path: &str| folder.join(path);
        let given = own.args.iter().chain(shared.env.values());
        if given.into_iter().any(|text| text.contains('\0')) {
            self.flaw(places.of("args"), "expected `args` and `env` without the character NUL");
        }
        let job = Job {
            id: own.id.clone(),
            name,
            line: self.line_ends.partition_point(|end| *end < places.head.start) + 1,
            wasm: here(&wasm_text),
            wasm_text,
            sha256: own.sha256.as_ref().map(|digits| digits.to_ascii_lowercase()),
            args,
            env,
            env_pass: shared.env_pass.clone().unwrap_or_default(),
            secrets: own.secrets.clone(),
            stdin,
            inputs: inputs
                .into_iter()
                .map(|(from, to, mode)| Input { from: here(&from), to, is_writable: mode == Mode::Rw })
                .collect(),
            outputs: outputs
                .into_iter()
                .map(|(from, to, output)| Output {
                    from,
                    to: plain(&here(&to)),
                    max: output.max.unwrap_or(files_max),
                    required: output.required,
                })
                .collect(),
            needs: vec![],
            when: own.when,
            tags: own.tags.clone(),
            expect: Expect {
                exit: own.expect.exit,
                stdout: expected.as_deref().map(here),
                fuel_max: own.expect.fuel_max,
            },
            allow_failure: own.allow_failure,
            serial: own.serial.clone(),
            retries: own.retries.as_ref().map_or(retries_of_run, retries),
            limits,
            stdout_max: shared.stdout_max.unwrap_or(Bytes::mib(1)),
            stderr_max: shared.stderr_max.unwrap_or(Bytes::mib(1)),
            files_max,
            http,
            tcp,
            isolation: match shared.isolation {
                None | Some(IsolationWord::Jail) => Isolation::Jail,
                Some(IsolationWord::Process) => Isolation::Process,
                Some(IsolationWord::Thread) => Isolation::Thread,
            },
            places: [
                "wasm", "sha256", "stdin", "inputs", "outputs", "expect", "needs", "matrix", "secrets", "env-pass",
            ]
            .map(|key| (key, places.of(key)))
            .into(),
        };
        self.check_guest_paths(written, &job);
        job
    }

    /// Sees that no two jobs have one name.
    fn check_cells(&mut self, jobs: &[Job]) {
        let mut names = HashSet::new();
        for job in jobs {
            if !names.insert(&job.name) {
                self.flaw(job.places["matrix"].clone(), format!("the matrix has `{}` twice", job.name));
            }
        }
    }

    /// Sees that outputs go to folders of their own, and to none that has all the rest in it.
    fn check_outputs(&mut self, jobs: &[Job]) {
        let outputs = jobs.iter().flat_map(|job| job.outputs.iter().map(move |output| (&*output.to, job)));
        let mut outputs: Vec<(&Path, &Job)> = outputs.collect();
        outputs.sort_by_key(|(to, _)| *to);
        for (to, job) in &outputs {
            if self.folder.starts_with(to) {
                let message = format!("expected a folder of its own, found `{}`", to.display());
                self.flaw(job.places["outputs"].clone(), message);
            }
        }
        for pair in outputs.windows(2) {
            if pair[1].0.starts_with(pair[0].0) {
                let (to, other, job) = (pair[1].0.display(), &pair[0].1.name, pair[1].1);
                self.flaw(job.places["outputs"].clone(), format!("`{to}` is where an output of `{other}` goes"));
            }
        }
    }

    /// What bounds a job.
    fn limits(&mut self, written: &Written, shared: &Shared, files_max: Bytes) -> Limits {
        let usual = Limits::of_a_run();
        let limits = Limits {
            memory: shared.memory.unwrap_or(usual.memory),
            timeout: Some(shared.timeout.unwrap_or(TIMEOUT).min(LONGEST)),
            // it is always counted
            fuel: Some(shared.fuel.unwrap_or(u64::MAX)),
            stack: shared.stack.unwrap_or(usual.stack),
            open_files: shared.open_files.unwrap_or(usual.open_files),
            file_size: files_max,
            threads: shared.threads.unwrap_or(0),
            ..usual
        };
        if limits.timeout == Some(Duration::ZERO) {
            self.flaw(written.places.of("timeout"), "expected a `timeout` of more than nothing");
        }
        if !(Bytes::kib(16)..=Bytes::mib(256)).contains(&limits.stack) {
            let message = format!("expected 16KiB to 256MiB for the `stack`, found {}", limits.stack);
            self.flaw(written.places.of("stack"), message);
        }
        if !(1..=100_000).contains(&limits.open_files) {
            self.flaw(written.places.of("open-files"), "expected 1 to 100000 `open-files`");
        }
        if limits.threads > 1000 {
            self.flaw(written.places.of("threads"), "expected at most 1000 `threads`");
        }
        limits
    }

    /// Sees that words are ones that this wrun knows: of some it knows the meaning, and cannot do it yet.
    fn check_words(&mut self, written: &Written, shared: &Shared) {
        let (own, places) = (&written.own, &written.places);
        let is_id = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let is_plain = own.id.chars().all(|c| is_id(c) || "_-".contains(c));
        if !own.id.starts_with(is_id) || own.id.len() > NAME_MAX || !is_plain {
            let expected = format!("expected an id of at most {NAME_MAX} small letters, digits, `-` and `_`");
            self.flaw(places.of("id"), format!("{expected}, found `{}`", own.id));
        }
        let not_yet = [
            (
                "world",
                shared.world.as_deref().is_some_and(|world| world != "wasi:cli"),
                "expected `wasi:cli`; other worlds are",
            ),
            ("clock", shared.clock.as_deref().is_some_and(|clock| clock != "real"), "a fixed clock is"),
            ("random", shared.random.as_deref().is_some_and(|random| random != "real"), "seeded random numbers are"),
            ("nan", shared.nan.as_deref().is_some_and(|nan| nan != "native"), "canonical NaNs are"),
            ("cache", shared.cache == Some(true), "the cache of results is"),
            ("table-elements", shared.table_elements.is_some(), "another bound of tables than wrun's own is"),
            (
                "protocol",
                own.protocol.as_deref().is_some_and(|protocol| protocol != "none"),
                "protocols of test suites are",
            ),
            ("expect", own.expect.fuel_tolerance.is_some(), "`fuel-tolerance` is"),
            (
                "wasm",
                ["sha256:", "oci://"].iter().any(|start| own.wasm.starts_with(start)),
                "guests from a registry are",
            ),
        ];
        for (key, _, what) in not_yet.into_iter().filter(|(_, is_asked, _)| *is_asked) {
            self.flaw(places.of(key), format!("{what} not supported yet"));
        }
        if own.sha256.as_ref().is_some_and(|text| text.len() != 64 || !text.chars().all(|c| c.is_ascii_hexdigit())) {
            self.flaw(places.of("sha256"), "expected the 64 hexadecimal digits of a SHA-256");
        }
        let is_name = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
        let names = [("secrets", &own.secrets[..]), ("env-pass", shared.env_pass.as_deref().unwrap_or_default())];
        for (key, names) in names {
            if let Some(name) = names.iter().find(|name| !is_name(name)) {
                self.flaw(places.of(key), format!("expected the name of a variable, found `{name}`"));
            }
        }
        if !shared.env.keys().all(is_name) {
            self.flaw(places.of("env"), "expected names of variables without `=`");
        }
        if let ExpectTable { fuel_max: Some(_), .. } = own.expect
            && shared.threads.is_some_and(|threads| threads > 0)
        {
            self.flaw(places.of("expect"), "fuel is not counted of a guest with threads: expected no `fuel-max`");
        }
    }

    /// Sees that what a guest has of files is where it can be, and in one place only.
    fn check_guest_paths(&mut self, written: &Written, job: &Job) {
        let inputs = job.inputs.iter().map(|input| ("inputs", &input.to));
        let all: Vec<_> = inputs.chain(job.outputs.iter().map(|output| ("outputs", &output.from))).collect();
        let mut seen = HashSet::new();
        for (key, path) in all {
            let parts = Path::new(path).components().skip(1);
            let is_plain = parts.clone().all(|part| matches!(part, Component::Normal(_))) && parts.count() > 0;
            if !path.starts_with('/') || !is_plain || path.contains('\0') {
                self.flaw(
                    written.places.of(key),
                    format!("expected a path in the guest such as `/data`, found `{path}`"),
                );
            } else if !seen.insert(path.trim_end_matches('/')) {
                self.flaw(written.places.of(key), format!("`{path}` is there twice in the guest"));
            }
        }
    }

    /// Puts in what `${…}` stands for; `$${` stands for `${`. Where the attempt is known `later`, both stay for
    /// [`at_attempt`].
    fn fill(&mut self, (place, id, cell): (Range<usize>, &str, &Cell), text: &str, later: bool) -> String {
        let itself = if later { "$${" } else { "${" };
        let (mut filled, mut rest) = (String::new(), text);
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                filled += before;
                filled += itself;
                rest = after;
                continue;
            }
            filled += before;
            let Some((name, after)) = after.split_once('}') else {
                self.flaw(place.clone(), format!("expected `}}` after `${{` in `{text}`; `$${{` stands for itself"));
                return filled;
            };
            let value = match name.strip_prefix("matrix.") {
                Some(key) => cell.iter().find(|(known, _)| known == key).map(|(_, value)| value.to_string()),
                None if name == "job" => Some(id.to_owned()),
                None if name == "attempt" && later => Some("${attempt}".into()),
                None => None,
            };
            match value {
                // what a value has of these stands for itself
                Some(value) if name.starts_with("matrix.") => filled += &value.replace("${", itself),
                Some(value) => filled += &value,
                None => {
                    let known = cell
                        .iter()
                        .map(|(key, _)| format!("matrix.{key}"))
                        .chain(["job".into()])
                        .chain(later.then(|| "attempt".into()));
                    let known: Vec<_> = known.collect();
                    let near = did_you_mean(name, known.iter().map(String::as_str));
                    self.flaw(place.clone(), format!("`${{{name}}}` stands for nothing{near}"));
                }
            }
            rest = after;
        }
        filled + rest
    }
}

/// A path without `.` and `..`, as far as that can be told from its text.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => _ = plain.pop(),
            part => plain.push(part),
        }
    }
    plain
}

/// What a text of a plan is in one attempt.
pub(super) fn at_attempt(text: &str, attempt: u32) -> String {
    let mut parts = text.split("$${");
    let first = parts.next().unwrap_or_default().replace("${attempt}", &attempt.to_string());
    parts.fold(first, |done, part| done + "${" + &part.replace("${attempt}", &attempt.to_string()))
}

fn retries(table: &RetriesTable) -> Retries {
    match table {
        RetriesTable::Number(count) => Retries::times(*count),
        RetriesTable::Table(spec) => Retries {
            count: spec.count,
            exponential: spec.backoff == Backoff::Exponential,
            delay: spec.delay.unwrap_or_default(),
            max_delay: spec.max_delay,
            jitter: spec.jitter,
        },
    }
}

/// `unit (case=a,size=1)`.
fn name_of(id: &str, cell: &Cell) -> String {
    if cell.is_empty() {
        return id.into();
    }
    let cell: Vec<_> = cell.iter().map(|(key, value)| format!("{key}={value}")).collect();
    format!("{id} ({})", cell.join(","))
}
