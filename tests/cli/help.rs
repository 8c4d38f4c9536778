//! The whole command line as one snapshot: no flag, default or word of help changes unseen.
//!
//! After a change that is meant: `INSTA_UPDATE=always cargo test --test cli help`, and read the difference.

use std::fmt::Write as _;

use guest_artifacts::HELLO;

use crate::wrun::wrun;

/// The page that `--help` prints.
fn page(command: &[&str]) -> String {
    wrun(command).args(["--help"]).env("COLUMNS", "100").run().code(0).stderr("").stdout_text()
}

/// The names of the commands that a page lists.
fn commands(page: &str) -> Vec<&str> {
    let list = page.lines().skip_while(|line| *line != "Commands:").skip(1);
    list.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn the_command_line_is_as_it_was() {
    let main = page(&[]);
    let mut reference = format!("$ wrun --help\n{main}");
    for command in commands(&main).into_iter().filter(|name| *name != "help") {
        let of_it = page(&[command]);
        let _ = write!(reference, "\n\n$ wrun {command} --help\n{of_it}");
        for below in commands(&of_it).into_iter().filter(|name| *name != "help") {
            let page = page(&[command, below]);
            let _ = write!(reference, "\n\n$ wrun {command} {below} --help\n{page}");
        }
    }
    insta::assert_snapshot!("command_line", reference);
}

#[test]
fn help_is_wide_enough_for_a_terminal_of_80() {
    let page = wrun(["run", "--help"]).env("COLUMNS", "80").run().code(0).stdout_text();
    // what is given as it is (an example, the exit codes) is not wrapped
    let long: Vec<_> = page.lines().filter(|line| line.chars().count() > 80 && !line.contains("wrun run")).collect();
    assert_eq!(long, [""; 0]);
}

#[test]
fn help_has_an_example_for_every_command() {
    for command in commands(&page(&[])).into_iter().filter(|name| *name != "help") {
        let page = page(&[command]);
        let (_, example) = page.split_once("\nExample:\n").unwrap_or_else(|| panic!("no example for `{command}`"));
        assert!(example.contains(&format!("wrun {command} ")), "{example}");
    }
}

#[test]
fn version_names_the_engine() {
    let expected = format!("wrun {} (wasmtime 48)\n", env!("CARGO_PKG_VERSION"));
    wrun(["--version"]).run().code(0).stdout(expected).stderr("");
}

#[test]
fn no_colours_where_nobody_sees_them() {
    for args in [&["--help"][..], &["run"], &["run", HELLO, "--nonsense"], &["run", "none.wasm"]] {
        let ran = wrun(args).env("TERM", "xterm-256color").run();
        assert!(!ran.stdout.contains(&0x1b) && !ran.stderr.contains(&0x1b), "{}", ran.transcript());
    }
}
