//! What a guest may touch: every grant allowed beside denied.

use guest_artifacts::{ARGS, ARGS_P1, HOSTILE_COMMAND, HOSTILE_COMMAND_P1};
use serde_json::json;

use crate::wrun::{Finished, Folder, Wrun};

/// A guest, and what is between it and the host: the same grants hold everywhere.
type Way = (&'static str, &'static str);

const WAYS: [Way; 4] = [
    (HOSTILE_COMMAND, "thread"),
    (HOSTILE_COMMAND, "jail"),
    (HOSTILE_COMMAND_P1, "thread"),
    (HOSTILE_COMMAND_P1, "jail"),
];

/// `wrun run` of a guest that way.
fn run(folder: &Folder, (guest, isolation): Way) -> Wrun {
    folder.wrun(["run", "--isolation", isolation, guest])
}

/// A folder to grant, `in`, with a secret beside it.
fn folder() -> Folder {
    Folder::new().file("in/a.txt", "granted\n").file("in/sub/b.txt", "below\n").file("secret/s.txt", "secret\n")
}

/// Runs an act of the hostile command with a grant.
#[track_caller]
fn with_dir(folder: &Folder, way: Way, grant: &str, act: &[&str]) -> Finished {
    run(folder, way).args(["--dir", grant, "--"]).args(act).run()
}

trait Access {
    fn refused(self) -> Finished;
    fn not_there(self) -> Finished;
}

impl Access for Finished {
    #[track_caller]
    fn refused(self) -> Finished {
        self.code(1).stdout("").stderr("permission denied\n")
    }

    #[track_caller]
    fn not_there(self) -> Finished {
        self.code(1).stdout("").stderr("entity not found\n")
    }
}

#[test]
fn a_granted_folder_is_read_and_no_other_is() {
    let folder = folder();
    for way in WAYS {
        let read = |path| with_dir(&folder, way, "in", &["read", path]);
        read("in/a.txt").code(0).stdout("granted\n").stderr("");
        read("in/sub/b.txt").code(0).stdout("below\n").stderr("");
        read("secret/s.txt").not_there();
        with_dir(&folder, way, "in", &["ls", "in"]).code(0).stdout("a.txt\nsub\n").stderr("");
        with_dir(&folder, way, "in", &["ls", "secret"]).not_there();

        let nothing = run(&folder, way).args(["--", "read", "in/a.txt"]).run();
        nothing.not_there();
    }
}

#[test]
fn several_folders_may_be_granted() {
    let folder = folder();
    for way in WAYS {
        let both = |act: [&str; 2]| run(&folder, way).args(["--dir=in:ro", "--dir=secret", "--"]).args(act).run();
        both(["read", "in/a.txt"]).code(0).stdout("granted\n");
        both(["read", "secret/s.txt"]).code(0).stdout("secret\n");
    }
}

#[test]
fn a_folder_is_written_when_it_is_not_read_only() {
    for way in WAYS {
        let folder = folder();
        let write = |grant, path| with_dir(&folder, way, grant, &["write", path, "new"]);
        write("in", "in/new.txt").code(0).stdout("").stderr("");
        assert_eq!(folder.read("in/new.txt"), "new");
        write("in:rw", "in/a.txt").code(0).stdout("").stderr("");
        assert_eq!(folder.read("in/a.txt"), "new");

        write("secret:ro", "secret/new.txt").refused();
        write("secret:ro", "secret/s.txt").refused();
        assert_eq!(folder.names("secret"), ["s.txt"]);
        assert_eq!(folder.read("secret/s.txt"), "secret\n");
        with_dir(&folder, way, "secret:ro", &["read", "secret/s.txt"]).code(0).stdout("secret\n");
    }
}

#[test]
fn no_path_leads_out_of_a_folder() {
    let folder = folder().link("in/relative", "../secret/s.txt").link("in/folder", "../secret").link("in/up", "..");
    let secret = folder.path("secret/s.txt");
    let folder = folder.link("in/absolute", &secret);
    for way in WAYS {
        let read = |path| with_dir(&folder, way, "in", &["read", path]);
        for path in ["in/../secret/s.txt", "in/sub/../../secret/s.txt", "in/./../in/../secret/s.txt"] {
            read(path).refused();
        }
        for link in ["in/relative", "in/absolute", "in/folder/s.txt", "in/up/secret/s.txt", "in/up/in/a.txt"] {
            read(link).refused();
        }
        for path in ["/etc/passwd", secret.to_str().unwrap(), "../secret/s.txt", "/proc/self/environ"] {
            read(path).not_there();
        }
        // writing takes the same ways
        for path in ["in/../secret/s.txt", "in/relative", "in/absolute", "in/folder/new.txt"] {
            with_dir(&folder, way, "in", &["write", path, "new"]).refused();
        }
        assert_eq!((folder.names("secret"), folder.read("secret/s.txt")), (vec!["s.txt".into()], "secret\n".into()));
    }
}

#[test]
fn links_within_a_folder_work() {
    let folder = folder().link("in/link", "sub/b.txt").link("in/sub/link", "../a.txt");
    for way in WAYS {
        let read = |path| with_dir(&folder, way, "in", &["read", path]);
        read("in/link").code(0).stdout("below\n");
        read("in/sub/link").code(0).stdout("granted\n");
        read("in/sub/../a.txt").code(0).stdout("granted\n");
    }
}

#[test]
fn a_folder_may_have_another_name_in_the_guest() {
    let folder = folder();
    let absolute = folder.path("in");
    for way in WAYS {
        let read = |grant: &str, path| with_dir(&folder, way, grant, &["read", path]);
        read("in::/data", "/data/a.txt").code(0).stdout("granted\n");
        read("in::/data:ro", "/data/a.txt").code(0).stdout("granted\n");
        read(&format!("{}::/data", absolute.display()), "/data/sub/b.txt").code(0).stdout("below\n");
        read("in::/", "/a.txt").code(0).stdout("granted\n");
        read("in::.", "a.txt").code(0).stdout("granted\n");
        // its own name is none of the guest's
        read("in::/data", "in/a.txt").not_there();
        read("in::/data", absolute.join("a.txt").to_str().unwrap()).not_there();
        with_dir(&folder, way, "in::/data:ro", &["write", "/data/new.txt", "new"]).refused();
    }
}

/// A name in a folder that may only be read is a way to the same file.
#[test]
fn what_is_read_only_is_not_changed_by_way_of_another_folder() {
    for way in WAYS {
        let folder = folder();
        let act = |act: [&str; 3]| run(&folder, way).args(["--dir=in", "--dir=secret:ro", "--"]).args(act).run();
        for taken in ["in/new.txt", "in/sub/"] {
            act(["rename", "secret/s.txt", taken]).code(1);
            act(["link", "secret/s.txt", taken]).code(1);
        }
        act(["rename", "in/a.txt", "secret/s.txt"]).code(1);
        act(["link", "in/a.txt", "secret/a.txt"]).code(1);
        assert_eq!((folder.names("secret"), folder.read("secret/s.txt")), (vec!["s.txt".into()], "secret\n".into()));
        assert_eq!(folder.names("in"), ["a.txt", "sub"]);
        // and among those that may be changed it works
        act(["rename", "in/a.txt", "in/sub/c.txt"]).code(0);
        act(["link", "in/sub/c.txt", "in/d.txt"]).code(0);
        assert_eq!(
            (folder.read("in/sub/c.txt"), folder.names("in")),
            ("granted\n".into(), vec!["d.txt".into(), "sub".into()])
        );
    }
}

/// A folder that becomes a link to somewhere else, and a folder again, while a guest reads through it.
#[test]
fn a_link_that_is_swapped_in_leads_nowhere() {
    for way in WAYS {
        let folder = folder().file("in/real/s.txt", "real\n").link("in/link", "../secret");
        let running = run(&folder, way).args(["--dir", "in", "--", "hunt", "in/now/s.txt", "20000"]).spawn();
        let (done, now) = (std::cell::Cell::new(false), folder.path("in/now"));
        let swap = || {
            for name in ["real", "link"] {
                let place = folder.path("in").join(name);
                std::fs::rename(&place, &now).unwrap();
                std::fs::rename(&now, &place).unwrap();
            }
        };
        let watch = rustix::process::pidfd_open(running.pid(), rustix::process::PidfdFlags::empty()).unwrap();
        while !done.get() {
            swap();
            let mut ended = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
            let at_once = rustix::event::Timespec::default();
            done.set(rustix::event::poll(&mut ended, Some(&at_once)).unwrap() == 1);
        }
        // it was there at times, so that there was something to win
        running.wait().code(0).stdout("real\n").stderr("");
    }
}

#[test]
fn a_guest_reaches_no_port() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    port.set_nonblocking(true).unwrap();
    let address = port.local_addr().unwrap().to_string();
    for way in WAYS {
        // a module has no sockets at all; what a component is told of, tests/cli/network.rs knows
        let error = if way.0 == HOSTILE_COMMAND { "permission denied" } else { "unsupported" };
        run(&Folder::new(), way).args(["--", "connect", &address]).run().code(1).stdout("").stderr_has(error);
        assert_eq!(port.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}

#[test]
fn a_jailed_guest_has_so_many_files_open_and_no_more() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let folder = folder();
        let open = |times: &str| with_dir(&folder, (guest, "jail"), "in", &["open", "in/a.txt", times]);
        open("64").code(0).stdout("64\n");
        open("80").code(1).stdout("").stderr("I/O error (os error 29)\n");
        let raised = folder.wrun(["run", "--isolation=jail", "--open-files=200", "--dir=in", guest, "--"]);
        raised.args(["open", "in/a.txt", "200"]).run().code(0).stdout("200\n");
    }
}

#[test]
fn a_jailed_guest_writes_files_of_a_size_and_none_larger() {
    for (guest, error) in [(HOSTILE_COMMAND, "I/O error (os error 29)\n"), (HOSTILE_COMMAND_P1, "file too large\n")] {
        let folder = folder();
        let fill = |bytes: &str| {
            let run = folder.wrun(["run", "--isolation=jail", "--file-size=1MiB", "--dir=in", guest, "--"]);
            run.args(["fill", "in/large", bytes]).run()
        };
        fill("1048576").code(0).stdout("").stderr("");
        fill("1048577").code(1).stderr(error);
        assert_eq!(folder.read("in/large").len(), 1 << 20);
    }
}

#[test]
fn a_grant_of_nothing_is_named_before_anything_starts() {
    let folder = folder();
    for way in [WAYS[0], WAYS[3], ("none.wasm", "thread")] {
        let grant = |grant| with_dir(&folder, way, grant, &["read", "in/a.txt"]).code(2);
        grant("none").error("could not grant `--dir none`: No such file or directory (os error 2)");
        grant("none::/x:ro").error("could not grant `--dir none::/x:ro`: No such file or directory (os error 2)");
        grant("in/a.txt").error("could not grant `--dir in/a.txt`: it is not a folder");
    }
}

#[test]
fn variables_are_given_or_passed_on() {
    let folder = Folder::new();
    for way in [(ARGS, "thread"), (ARGS, "jail"), (ARGS_P1, "thread"), (ARGS_P1, "jail")] {
        let run = |grants: &[&str]| {
            let env = run(&folder, way).args(grants.iter().flat_map(|grant| ["--env", grant]));
            env.env("GRANTED", "value of wrun").env("SECRET", "s3cr3t").run().code(0).stderr("").stdout_json()["env"]
                .clone()
        };
        assert_eq!(run(&[]), json!({}));
        assert_eq!(run(&["A=b"]), json!({"A": "b"}));
        assert_eq!(run(&["A=b=c d", "EMPTY=", "É=漢"]), json!({"A": "b=c d", "EMPTY": "", "É": "漢"}));
        assert_eq!(run(&["GRANTED"]), json!({"GRANTED": "value of wrun"}));
        assert_eq!(run(&["GRANTED=other"]), json!({"GRANTED": "other"}));
    }
}

#[test]
fn a_variable_that_is_not_set_cannot_be_passed_on() {
    let error = Folder::new().wrun(["run", ARGS, "--env", "NONE"]).run().code(2).stdout("");
    error.stderr_has("`NONE` is to be passed on but is not set; give it a value: `NONE=VALUE`");
}
