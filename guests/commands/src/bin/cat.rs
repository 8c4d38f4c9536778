//! Copies its files, or else its stdin, to stdout.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let files: Vec<_> = env::args().skip(1).collect();
    let copied = if files.is_empty() {
        copy("stdin", Ok(io::stdin().lock()))
    } else {
        files.iter().try_for_each(|file| copy(file, File::open(file)))
    };
    match copied {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cat: {message}");
            ExitCode::FAILURE
        }
    }
}

fn copy(name: &str, source: io::Result<impl Read>) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    source
        .and_then(|mut source| io::copy(&mut source, &mut stdout))
        // what is left in the buffer at exit fails in silence
        .and_then(|_| stdout.flush())
        .map_err(|error| format!("{name}: {error}"))
}
