//! What a guest may touch: every grant allowed beside denied.

use guest_artifacts::{ARGS, ARGS_P1, HOSTILE_COMMAND, HOSTILE_COMMAND_P1};
use serde_json::json;

use crate::wrun::{Finished, Folder};

const GUESTS: [&str; 2] = [HOSTILE_COMMAND, HOSTILE_COMMAND_P1];

/// A folder to grant, `in`, with a secret beside it.
fn folder() -> Folder {
    Folder::new().file("in/a.txt", "granted\n").file("in/sub/b.txt", "below\n").file("secret/s.txt", "secret\n")
}

/// Runs an act of the hostile command with a grant.
#[track_caller]
fn with_dir(folder: &Folder, guest: &str, grant: &str, act: &[&str]) -> Finished {
    folder.wrun(["run", "--dir", grant, guest, "--"]).args(act).run()
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
    for guest in GUESTS {
        let read = |path| with_dir(&folder, guest, "in", &["read", path]);
        read("in/a.txt").code(0).stdout("granted\n").stderr("");
        read("in/sub/b.txt").code(0).stdout("below\n").stderr("");
        read("secret/s.txt").not_there();
        with_dir(&folder, guest, "in", &["ls", "in"]).code(0).stdout("a.txt\nsub\n").stderr("");
        with_dir(&folder, guest, "in", &["ls", "secret"]).not_there();

        let nothing = folder.wrun(["run", guest, "--", "read", "in/a.txt"]).run();
        nothing.not_there();
    }
}

#[test]
fn several_folders_may_be_granted() {
    let folder = folder();
    for guest in GUESTS {
        let run = |act: [&str; 2]| folder.wrun(["run", "--dir=in:ro", "--dir=secret", guest, "--"]).args(act).run();
        run(["read", "in/a.txt"]).code(0).stdout("granted\n");
        run(["read", "secret/s.txt"]).code(0).stdout("secret\n");
    }
}

#[test]
fn a_folder_is_written_when_it_is_not_read_only() {
    for guest in GUESTS {
        let folder = folder();
        let write = |grant, path| with_dir(&folder, guest, grant, &["write", path, "new"]);
        write("in", "in/new.txt").code(0).stdout("").stderr("");
        assert_eq!(folder.read("in/new.txt"), "new");
        write("in:rw", "in/a.txt").code(0).stdout("").stderr("");
        assert_eq!(folder.read("in/a.txt"), "new");

        write("secret:ro", "secret/new.txt").refused();
        write("secret:ro", "secret/s.txt").refused();
        assert_eq!(folder.names("secret"), ["s.txt"]);
        assert_eq!(folder.read("secret/s.txt"), "secret\n");
        with_dir(&folder, guest, "secret:ro", &["read", "secret/s.txt"]).code(0).stdout("secret\n");
    }
}

#[test]
fn no_path_leads_out_of_a_folder() {
    let folder = folder().link("in/relative", "../secret/s.txt").link("in/folder", "../secret").link("in/up", "..");
    let secret = folder.path("secret/s.txt");
    let folder = folder.link("in/absolute", &secret);
    for guest in GUESTS {
        let read = |path| with_dir(&folder, guest, "in", &["read", path]);
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
            with_dir(&folder, guest, "in", &["write", path, "new"]).refused();
        }
        assert_eq!((folder.names("secret"), folder.read("secret/s.txt")), (vec!["s.txt".into()], "secret\n".into()));
    }
}

#[test]
fn links_within_a_folder_work() {
    let folder = folder().link("in/link", "sub/b.txt").link("in/sub/link", "../a.txt");
    for guest in GUESTS {
        let read = |path| with_dir(&folder, guest, "in", &["read", path]);
        read("in/link").code(0).stdout("below\n");
        read("in/sub/link").code(0).stdout("granted\n");
        read("in/sub/../a.txt").code(0).stdout("granted\n");
    }
}

#[test]
fn a_folder_may_have_another_name_in_the_guest() {
    let folder = folder();
    let absolute = folder.path("in");
    for guest in GUESTS {
        let read = |grant: &str, path| with_dir(&folder, guest, grant, &["read", path]);
        read("in::/data", "/data/a.txt").code(0).stdout("granted\n");
        read("in::/data:ro", "/data/a.txt").code(0).stdout("granted\n");
        read(&format!("{}::/data", absolute.display()), "/data/sub/b.txt").code(0).stdout("below\n");
        read("in::/", "/a.txt").code(0).stdout("granted\n");
        read("in::.", "a.txt").code(0).stdout("granted\n");
        // its own name is none of the guest's
        read("in::/data", "in/a.txt").not_there();
        read("in::/data", absolute.join("a.txt").to_str().unwrap()).not_there();
        with_dir(&folder, guest, "in::/data:ro", &["write", "/data/new.txt", "new"]).refused();
    }
}

#[test]
fn a_grant_of_nothing_is_named_before_anything_starts() {
    let folder = folder();
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1, "none.wasm"] {
        let grant = |grant| with_dir(&folder, guest, grant, &["read", "in/a.txt"]).code(2);
        grant("none").error("could not grant `--dir none`: No such file or directory (os error 2)");
        grant("none::/x:ro").error("could not grant `--dir none::/x:ro`: No such file or directory (os error 2)");
        grant("in/a.txt").error("could not grant `--dir in/a.txt`: it is not a folder");
    }
}

#[test]
fn variables_are_given_or_passed_on() {
    let folder = Folder::new();
    for guest in [ARGS, ARGS_P1] {
        let run = |grants: &[&str]| {
            let env = folder.wrun(["run", guest]).args(grants.iter().flat_map(|grant| ["--env", grant]));
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
