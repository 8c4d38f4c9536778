//! The `wrun` command: parse, run one mode, render, exit.

mod cli;
mod report;

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Parser;
use wrun::{CompileFlags, Error, Run, limits::Bytes, outcome::Outcome};

use crate::{
    cli::{Cli, Command, CompileArgs, RunArgs},
    report::Printer,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let printer = Printer { format: cli.log_format };
    let done = match cli.command {
        Command::Run(args) => run(args, printer),
        Command::Cluster(_) => Err(Error::Usage("`cluster` is not supported yet".into())),
        Command::Inspect(args) => wrun::inspect(&args.guest).map(|found| {
            report::inspection(&found, args.json);
            0
        }),
        Command::Compile(args) => compile(&args),
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
        .run_or_exit(move |outcome| {
            #[expect(clippy::exit, reason = "the guest is stuck in this process")]
            std::process::exit(at_deadline.print(&outcome).into());
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

fn compile(args: &CompileArgs) -> Result<u8, Error> {
    let flags = CompileFlags { epoch_checks: args.epoch, fuel: args.fuel };
    match &args.output {
        Some(output) => wrun::compile_to(&args.guest, output, flags)?,
        None => report::result(&wrun::compile_into(&args.cache.cache(), &args.guest, flags)?.0.display().to_string()),
    }
    Ok(0)
}
