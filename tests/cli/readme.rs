//! What the documents promise: the README's examples print what they say, and each promise of SECURITY.md has a test.

use std::{fs, path::Path, process::Command};

use crate::wrun::{Folder, WRUN};

/// One command and the lines it should print; `…` stands for anything.
struct Example {
    command: String,
    expected: Vec<String>,
}

fn examples(readme: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = vec![];
    let mut inside = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(command) = line.strip_prefix("$ ") {
            examples.push(Example { command: command.into(), expected: vec![] });
        } else if let Some(more) = line.strip_prefix("> ") {
            let example = examples.last_mut().expect("a command goes on");
            example.command.push('\n');
            example.command.push_str(more);
        } else {
            examples.last_mut().expect("a command comes first").expected.push(line.into());
        }
    }
    examples
}

/// Whether a line is as it was promised.
fn fits(line: &str, expected: &str) -> bool {
    let mut rest = line;
    let mut parts = expected.split('…');
    let first = parts.next().expect("a split has a first part");
    let Some(after) = rest.strip_prefix(first) else { return false };
    rest = after;
    let mut ended = true;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
        ended = part.is_empty();
    }
    rest.is_empty() || (ended && expected.contains('…'))
}

#[test]
fn promises_are_compared_as_they_are_meant() {
    assert!(fits("abc", "abc") && !fits("abcd", "abc") && !fits("xabc", "abc"));
    assert!(fits("a 17 b", "a … b") && fits("a b", "a…") && !fits("b", "a…"));
}

#[test]
fn the_readmes_examples_print_what_they_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let examples = examples(&readme);
    assert!(examples.len() >= 7, "{} examples were found", examples.len());
    // the names that the examples use, wherever the program and the guests were built
    let folder = Folder::new().folder("target/release").file("README.md", &readme);
    std::os::unix::fs::symlink(WRUN, folder.path("target/release/wrun")).unwrap();
    std::os::unix::fs::symlink(guest_artifacts::dir(), folder.path("target/guests")).unwrap();
    for file in ["guests/wrun-ci.toml", "guests/fixtures/hello.txt"] {
        fs::create_dir_all(folder.path(file).parent().unwrap()).unwrap();
        fs::copy(root.join(file), folder.path(file)).unwrap();
    }
    std::os::unix::fs::symlink(root.join("wit"), folder.path("wit")).unwrap();
    // a port that is free; whoever takes it meanwhile makes the example fail
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for Example { command, expected } in examples {
        let command = command.replace("8080", &port.to_string());
        let output = Command::new("sh")
            .args(["-c", &format!("exec 2>&1; {command}")])
            .current_dir(folder.path("."))
            .env("XDG_CACHE_HOME", folder.path("cache"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        // of a pool the answers are shown, not its news
        let news = |line: &&str| command.contains(" cluster ") && !line.starts_with('{');
        let lines: Vec<&str> = text.lines().filter(|line| !news(line)).collect();
        let all_fit =
            lines.len() == expected.len() && lines.iter().zip(&expected).all(|(line, promise)| fits(line, promise));
        assert!(all_fit, "$ {command}\nis promised to print\n{}\nand prints\n{text}", expected.join("\n"));
    }
}

#[test]
fn every_promise_of_security_names_tests_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let security = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let (_, promises) = security.split_once("\n## Promises\n").unwrap();
    let (promises, _) = promises.split_once("\n## ").unwrap();
    let mut count = 0;
    for promise in promises.lines().filter(|line| line.starts_with("- ")) {
        let (_, tests) = promise.rsplit_once(". [").unwrap_or_else(|| panic!("no test: {promise}"));
        for test in tests.trim_end_matches(']').split(", ") {
            let test = test.trim_matches('`');
            let (file, name) = match test.split_once("::") {
                Some((module, name)) => (format!("tests/cli/{module}.rs"), name),
                None => match test.split_once(':') {
                    Some((file, name)) => (format!("tests/{file}.rs"), name),
                    None => ("tests/library.rs".to_owned(), test),
                },
            };
            let source = fs::read_to_string(root.join(&file)).unwrap_or_else(|error| panic!("{test}: {file}: {error}"));
            assert!(source.contains(&format!("#[test]\nfn {name}()")), "there is no test {test}");
            count += 1;
        }
    }
    assert!(count >= 50, "{count} tests were named");
}
