//! The `wrun` command: parse, run one mode, render, exit.

mod cli;
mod report;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use clap::Parser;
use wrun::{
    Compile, Error, ParMap, Run, Shape,
    cluster::{End, lines, serve},
    command::foreground::{self, Forked, Form},
    doctor::Checkup,
    event::Event,
    limits::Bytes,
    outcome::Outcome,
    watch,
};

use crate::{
    cli::{
        CiArgs, CiCommand, CiRunArgs, Cli, ClusterArgs, Command, CompileArgs, ExecArgs, ForkArgs, InspectArgs,
        LogFormat, NoTests, Output, RunArgs, SpawnArgs, ThreadsArgs, WatchArgs,
    },
    report::{CiPrinter, EventLog, Printer, Progress},
};

fn main() -> ExitCode {
    wrun::init();
    let cli = Cli::parse();
    report::log_to_stderr(cli.log_format, cli.verbose);
    let printer = Printer { format: cli.log_format };
    let done = match cli.command {
        Command::Run(args) => run(args, printer),
        Command::Spawn(args) => spawn(*args, printer),
        Command::Exec(args) => exec(*args, printer),
        Command::Fork(args) => fork(*args, printer),
        Command::Cluster(args) => cluster(*args, printer),
        Command::Threads(args) => threads(*args, printer),
        Command::Watch(args) => watch(*args, printer),
        Command::Ci(args) => Ok(ci(&args, printer)),
        Command::Inspect(args) => inspect(&args),
        Command::Compile(args) => compile(&args),
        Command::Doctor(args) => Checkup::run().map(|found| {
            report::checkup(&found, args.json);
            if found.jail { 0 } else { wrun::ExitCode::Cannot as u8 }
        }),
    };
    ExitCode::from(done.unwrap_or_else(|error| {
        printer.error(&error);
        error.exit_code() as u8
    }))
}

fn run(args: RunArgs, printer: Printer) -> Result<u8, Error> {
    let report = OutcomeReport { guest: args.guest.clone(), json: args.json, printer };
    let at_deadline = report.clone();
    let outcome = Run::new(args.guest)
        .args(args.args)
        .grants(args.grants.grants())
        .limits(args.limits.limits(args.timeout, Bytes::mib(1)))
        .cache(args.cache.cache())
        .precompiled(args.precompiled)
        .isolation(args.isolation.into())
        .compile_limits(args.compile.limits())
        .on_denied(move |denied| printer.denied(denied))
        .run_or_exit(move |outcome| {
            let code = outcome.end.exit_code();
            // whoever should read the news may be as stuck as the guest: the end waits for neither for long
            let (told, done) = mpsc::channel();
            thread::spawn(move || told.send(at_deadline.print(&outcome)));
            let _ = done.recv_timeout(Duration::from_secs(1));
            #[expect(clippy::exit, reason = "the guest is stuck in this process")]
            std::process::exit(code.into());
        })?;
    Ok(report.print(&outcome))
}

/// Where the outcome of a run is told.
#[derive(Clone)]
struct OutcomeReport {
    guest: PathBuf,
    json: Option<PathBuf>,
    printer: Printer,
}

impl OutcomeReport {
    /// Tells it, and answers the exit code.
    fn print(&self, outcome: &Outcome) -> u8 {
        match &self.json {
            None => self.printer.outcome(&self.guest, outcome),
            Some(file) if file.as_os_str().is_empty() => self.printer.log_line(outcome),
            Some(file) => {
                let text = serde_json::to_string(outcome).expect("plain data has a JSON form") + "\n";
                if let Err(source) = fs::write(file, text) {
                    self.printer.error(&Error::Io { what: "write the outcome", source });
                }
            }
        }
        outcome.end.exit_code()
    }
}

fn spawn(args: SpawnArgs, printer: Printer) -> Result<u8, Error> {
    let (guest, json) = (args.child.guest.clone(), args.json);
    in_foreground(foreground::spawn, &guest, args.command()?, json, printer)
}

fn exec(args: ExecArgs, printer: Printer) -> Result<u8, Error> {
    let (guest, json) = (args.child.guest.clone(), args.json);
    in_foreground(foreground::exec, &guest, args.command()?, json, printer)
}

/// Runs a child to its end, and says how it ended unless that is in the JSON.
fn in_foreground(
    run: fn(&mut wrun::Command, Form) -> Result<Outcome, Error>,
    guest: &Path,
    mut command: wrun::Command,
    json: bool,
    printer: Printer,
) -> Result<u8, Error> {
    let form = if json { Form::Json } else { Form::Raw };
    let outcome = run(command.on_denied(move |denied| printer.denied(denied)), form)?;
    if form == Form::Raw {
        printer.outcome(guest, &outcome);
    }
    Ok(outcome.end.exit_code())
}

fn fork(args: ForkArgs, printer: Printer) -> Result<u8, Error> {
    let guest = args.child.guest.clone();
    with_mailbox(&guest, &mut args.command()?, io::stdin(), printer)
}

fn threads(args: ThreadsArgs, printer: Printer) -> Result<u8, Error> {
    let (guest, input, has_tasks) = (args.child.guest.clone(), args.input()?, args.has_tasks());
    let chunks = args.chunks()?;
    let mut command = args.command()?;
    if let Some((map, output)) = chunks {
        return par_map(&guest, &mut command, map, output, printer);
    }
    match foreground::shape(&command)? {
        Some(Shape::Handler) => {
            cli::print_aside(&mut command)?;
            with_mailbox(&guest, &mut command, input, printer)
        }
        _ if has_tasks => Err(Error::Usage("a command has no tasks: expected a handler, or no `--tasks`".into())),
        // its input and output are its own
        _ => in_foreground(foreground::spawn, &guest, command, false, printer),
    }
}

/// Hands out the chunks of a file, and says what failed first.
fn par_map(
    guest: &Path,
    command: &mut wrun::Command,
    map: ParMap,
    output: Option<Output>,
    printer: Printer,
) -> Result<u8, Error> {
    let progress = Progress::of(map.input_length(), printer);
    let bar = progress.clone();
    command.on_denied(move |denied| printer.denied(denied));
    let mapped = foreground::par_map(command, map, io::stdout(), move |chunk| bar.advance(chunk.length));
    progress.end();
    let mapped = mapped?;
    if let Some(failed) = &mapped.failed {
        printer.failed(guest, failed);
        return Ok(failed.exit_code());
    }
    printer.outcome(guest, &mapped.outcome);
    if let (Some(output), Some(bytes)) = (output, mapped.output) {
        output.write(&bytes)?;
    }
    Ok(mapped.outcome.end.exit_code())
}

/// Runs a child with its mailbox as lines, and says how it ended.
fn with_mailbox(
    guest: &Path,
    command: &mut wrun::Command,
    input: impl io::Read + Send + 'static,
    printer: Printer,
) -> Result<u8, Error> {
    let cannot = |source| Error::Io { what: "open the log", source };
    let (log, last_lines) = EventLog::start(printer, None).map_err(cannot)?;
    let forked = foreground::fork(command, input, io::stdout(), move |event| {
        // a person wants to know what went wrong, a tool all that happened
        if printer.format == LogFormat::Json || matches!(event, Event::Error { .. } | Event::Denied { .. }) {
            log.tell(&event);
        }
    });
    last_lines.wait();
    let Forked { outcome, refused } = forked?;
    if printer.format == LogFormat::Text {
        printer.outcome(guest, &outcome);
    }
    Ok(match outcome.end.exit_code() {
        0 if refused > 0 => wrun::ExitCode::Limit as u8,
        code => code,
    })
}

fn cluster(args: ClusterArgs, printer: Printer) -> Result<u8, Error> {
    let ordered = args.ordered;
    let access_log = args.port.clients.log_file();
    let listen = args.port.listen;
    let mut builder = args.builder()?;
    let listens = match listen {
        Some(_) => true,
        // without an address the guest decides: one that answers requests gets a port, a handler gets lines
        None if serve::shape(&builder)? == Some(Shape::Http) => {
            builder = builder.listen(cli::LISTEN);
            true
        }
        None => false,
    };
    let cannot = |source| Error::Io { what: "open the log", source };
    let (log, last_lines) = EventLog::start(printer, None).map_err(cannot)?;
    let (access, last_requests) = match &access_log {
        Some(file) => {
            EventLog::start(printer, Some(file)).map(|(log, last)| (Some(log), Some(last))).map_err(cannot)?
        }
        None => (None, None),
    };
    let end = if listens {
        serve::run(builder, move |event| match (&event, &access) {
            (Event::Access { .. }, Some(access)) => access.tell(&event),
            (event, _) => {
                if let Event::Listening { address } = event {
                    report::result(&format!("listening on http://{address}"));
                }
                log.tell(event);
            }
        })
    } else {
        lines::run(builder, io::stdin(), io::stdout(), ordered, move |event| log.tell(&event))
    };
    last_lines.wait();
    last_requests.into_iter().for_each(report::LastLines::wait);
    Ok(code_of(end?))
}

fn watch(args: WatchArgs, printer: Printer) -> Result<u8, Error> {
    let cannot = |source| Error::Io { what: "open the log", source };
    let (log, last_lines) = EventLog::start(printer, None).map_err(cannot)?;
    let access = args.clients.log_file().map(|file| EventLog::start(printer, Some(&file)));
    let (access, last_requests) = access.transpose().map_err(cannot)?.unzip();
    let end = watch::run(args.builder()?, move |event| match (&event, &access) {
        (watch::Event::Access { .. }, Some(access)) => access.tell(&event),
        (event, _) => {
            if let watch::Event::Listening { address } = event {
                report::result(&format!("listening on http://{address}"));
            }
            log.tell(event);
        }
    });
    last_lines.wait();
    last_requests.into_iter().for_each(report::LastLines::wait);
    Ok(code_of(end?))
}

/// The exit code of a mode that goes on until it is stopped.
fn code_of(end: End) -> u8 {
    match end {
        End::Done | End::Stopped { killed: false, .. } => 0,
        End::Stopped { signal, killed: true } => u8::try_from(128 + signal).unwrap_or(255),
        End::OutputClosed => 141,
    }
}

/// Runs jobs, or does what else there is to do with them.
fn ci(args: &CiArgs, printer: Printer) -> u8 {
    let done = match &args.command {
        None => run_jobs(&args.run),
        Some(CiCommand::Check(file)) => file.builder().and_then(|jobs| {
            let planned = jobs.plan()?;
            planned.check()?;
            let jobs = planned.list().len();
            let plural = if jobs == 1 { "" } else { "s" };
            report::result(&format!("{jobs} job{plural}, and nothing wrong"));
            Ok(0)
        }),
        Some(CiCommand::Schema) => {
            report::result(&serde_json::to_string_pretty(&wrun::ci::schema()).expect("it has a JSON form"));
            Ok(0)
        }
        Some(CiCommand::Init(init)) => write_jobs(&init.folder),
        Some(CiCommand::ExplainCache(_)) => Err(wrun::ci::Error::later("explain-cache")),
        Some(CiCommand::FuelBaseline(_)) => Err(wrun::ci::Error::later("fuel-baseline")),
        Some(CiCommand::Cache(_)) => Err(wrun::ci::Error::later("cache")),
    };
    done.unwrap_or_else(|error| {
        let is_well = matches!(error, wrun::ci::Error::Nothing) && args.run.no_tests == NoTests::Pass;
        if !is_well {
            printer.ci_error(&error);
        }
        if is_well { 0 } else { error.exit_code() }
    })
}

fn run_jobs(args: &CiRunArgs) -> Result<u8, wrun::ci::Error> {
    let planned = args.builder()?.plan()?;
    if args.list {
        report::jobs(&planned.list(), args.is_json());
        return Ok(0);
    }
    let planned = args.with_json(planned)?;
    let modes = (args.color, args.progress);
    let mut lines = CiPrinter::new(modes, (planned.show(), args.is_json()), planned.folder(), &args.path()?);
    let done = wrun::ci::run(planned, |event| lines.tell(event))?;
    lines.done(&done);
    Ok(done.record.exit)
}

/// Writes a job file for the guests below a folder.
fn write_jobs(folder: &Path) -> Result<u8, wrun::ci::Error> {
    let is_command =
        |guest: &Path| wrun::inspect(guest).is_ok_and(|found| found.inspection.shape == Some(Shape::Command));
    let (text, guests) = wrun::ci::init(folder, is_command);
    let path = folder.join(wrun::ci::FILES[0]);
    let written = fs::File::create_new(&path).and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|source| wrun::ci::Error::Report { what: "the job file", path: path.clone(), source })?;
    report::result(&format!(
        "wrote `{}` with {guests} jobs; `wrun ci check` looks at it, `wrun ci` runs it",
        path.display()
    ));
    Ok(0)
}

fn inspect(args: &InspectArgs) -> Result<u8, Error> {
    if args.guest.is_dir() {
        let found = watch::inspect(&args.guest)?;
        report::folder(&found, args.json);
        let is_all = found.apps.iter().all(|app| app.refused.is_none());
        return Ok(if is_all { 0 } else { wrun::ExitCode::Usage as u8 });
    }
    report::inspection(&wrun::inspect(&args.guest)?, args.json);
    Ok(0)
}

fn compile(args: &CompileArgs) -> Result<u8, Error> {
    let compile = Compile::new(&args.guest).epoch_checks(args.epoch).fuel(args.fuel).limits(args.limits.limits());
    match &args.output {
        Some(output) => compile.to_file(output)?,
        None => report::result(&compile.into_cache(&args.cache.cache())?.0.display().to_string()),
    }
    Ok(0)
}
