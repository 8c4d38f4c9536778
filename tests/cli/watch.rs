//! A folder whose guests are live: what comes, changes and goes there, and what clients feel of it.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use guest_artifacts::{
    ARGS_P1, CAT, CRASH, CRASH_AT_START, ECHO, HELLO, HELLO_HTTP, HOSTILE, HOSTILE_COMMAND_P1, SLOW, UPLOAD,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    client::{Client, Response, Server},
    load::{Load, Who, eventually},
    supervision::{children, event, events, gone, pid},
    wrun::{Folder, Wrun},
};

/// A folder in which apps are put, and the program that watches it.
struct Apps {
    folder: Folder,
    server: Server,
}

impl Apps {
    #[track_caller]
    fn new() -> Self {
        Self::with(|wrun| wrun)
    }

    /// With more flags.
    #[track_caller]
    fn with(change: impl FnOnce(Wrun) -> Wrun) -> Self {
        Self::of(Folder::new().folder("apps"), change)
    }

    /// Of a folder that has something in it.
    #[track_caller]
    fn of(folder: Folder, change: impl FnOnce(Wrun) -> Wrun) -> Self {
        let wrun = change(folder.wrun(["watch", "apps", "--listen", "0", "--log-format", "json"]));
        Self { folder, server: Server::start(wrun) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path("apps").join(name)
    }

    /// Puts a file in its place at once, as a careful installer does.
    fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let aside = self.path(&format!(".{name}.tmp"));
        fs::write(&aside, content).unwrap();
        fs::rename(aside, self.path(name)).unwrap();
    }

    /// The next event of this name about an app.
    #[track_caller]
    fn told(&mut self, name: &str, app: &str) -> Value {
        loop {
            let event = event(&mut self.server, name);
            if event["app"] == app {
                return event;
            }
        }
    }

    /// Puts a guest, and waits until it is live.
    #[track_caller]
    fn live(&mut self, app: &str, guest: impl AsRef<[u8]>) -> Value {
        self.put(&format!("{app}.wasm"), guest);
        self.told("live", app)
    }

    #[track_caller]
    fn get(&self, path: &str) -> Response {
        self.server.get(path)
    }

    /// What the list says of an app.
    #[track_caller]
    fn listed(&self, app: &str) -> Value {
        let list = self.get("/").json();
        list["apps"].as_array().unwrap().iter().find(|entry| entry["name"] == app).cloned().unwrap_or_default()
    }
}

fn guest(path: &str) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// The same guest as another file: a custom section more.
fn variant(path: &str, number: u8) -> Vec<u8> {
    // section 0, two bytes: a name of one, and nothing else
    [guest(path), vec![0, 2, 1, b'a' + number]].concat()
}

#[track_caller]
fn kind(response: &Response) -> (u16, String) {
    (response.status, response.json()["error"]["kind"].as_str().unwrap_or_default().into())
}

#[test]
fn a_guest_that_is_dropped_is_live_and_one_that_is_removed_is_gone() {
    let mut apps = Apps::new();
    assert_eq!(apps.get("/").json(), json!({"apps": []}));
    assert_eq!(kind(&apps.get("/upload")), (404, "not-found".into()));
    let live = apps.live("upload", guest(UPLOAD));
    for (path, seen) in [
        ("/upload", "/"),
        ("/upload?a=b", "/?a=b"),
        ("/upload/", "/"),
        ("/upload/a/../b%2f?c=/d", "/a/../b%2f?c=/d"),
        ("/upload//x", "//x"),
    ] {
        assert_eq!(apps.get(path).json()["path"], seen, "{path}");
    }
    for path in ["/uploads", "/Upload", "/x/upload", "//upload"] {
        assert_eq!(apps.get(path).status, 404, "{path}");
    }
    let listed = apps.listed("upload");
    assert_eq!((&listed["state"], &listed["at"], &listed["workers"]), (&json!("live"), &json!("/upload"), &json!(1)));
    assert_eq!((&listed["version"], &listed["error"]), (&live["version"], &Value::Null));
    assert!(listed["since_ms"].as_u64() > Some(1_700_000_000_000));
    fs::remove_file(apps.path("upload.wasm")).unwrap();
    apps.told("removed", "upload");
    assert_eq!(kind(&apps.get("/upload")), (404, "not-found".into()));
    assert_eq!(apps.get("/").json(), json!({"apps": []}));
    // at the end of all, all are told of
    apps.live("other", guest(HELLO_HTTP));
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    let events = events(&finished);
    assert!(events.iter().all(|event| event["event"] != "error"), "{}", finished.stderr_text());
    let exits: Vec<_> = events.iter().filter(|event| event["event"] == "exit").collect();
    assert!(exits.iter().all(|exit| exit["outcome"]["voluntary"] == true), "{exits:?}");
    assert!(exits.iter().any(|exit| exit["app"] == "other") && exits.iter().any(|exit| exit["part"] == "router"));
}

#[test]
fn texts_and_handlers_are_apps_too() {
    let mut apps = Apps::new();
    apps.live("echo", guest(ECHO));
    assert_eq!(apps.server.post("/echo", "[1, 2]").text(), "[1, 2]");
    assert_eq!(kind(&apps.get("/echo")), (405, "method".into()));
    // what can be read is no less a guest than what is compiled, and no more
    apps.put("text.wat", "(component)");
    let refused = apps.told("refused", "text");
    assert!(refused["reason"].as_str().unwrap().contains("exports nothing wrun can run"), "{refused}");
    apps.put("text.wat", "(component");
    let refused = apps.told("refused", "text");
    assert!(refused["reason"].as_str().unwrap().contains("expected `)`"), "{refused}");
    apps.put("echo.wat", "(component)");
    let ignored = event(&mut apps.server, "ignored");
    assert_eq!(
        (&ignored["file"], &ignored["reason"]),
        (&json!("echo.wat"), &json!("there is a `.wasm` of the same name"))
    );
    assert_eq!(apps.server.post("/echo", "3").text(), "3");
}

#[test]
fn what_is_there_at_the_start_is_served() {
    let folder = Folder::new().file("apps/a.wasm", guest(HELLO_HTTP)).file("apps/b.wasm", guest(ECHO));
    let mut apps = Apps::of(folder.file("apps/c.wasm", "junk").file("apps/README", "no app"), |wrun| wrun);
    let mut names: Vec<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].clone()).collect();
    names.sort_by_key(ToString::to_string);
    assert_eq!(names, ["a", "b"]);
    assert_eq!((apps.get("/a").status, apps.server.post("/b", "1").text()), (200, "1".into()));
    eventually("the third is refused", || apps.listed("c")["state"] == "refused");
    assert!(apps.listed("c")["error"].as_str().unwrap().contains("found a text that is not WAT"));
}

#[test]
fn a_file_that_is_written_slowly_is_not_read_before_it_is_closed() {
    let mut apps = Apps::new();
    // of any length: what makes it whole is that its writer closes it
    let whole = [guest(HELLO_HTTP), vec![0; 0]].concat();
    let mut file = fs::File::create(apps.path("slow.wasm")).unwrap();
    let (first, rest) = whole.split_at(whole.len() / 2);
    file.write_all(first).unwrap();
    // as long as any file rests that nobody is heard to write
    apps.live("other", guest(HELLO_HTTP));
    fs::remove_file(apps.path("other.wasm")).unwrap();
    apps.told("removed", "other");
    assert_eq!(apps.listed("slow"), Value::Null);
    file.write_all(rest).unwrap();
    drop(file);
    apps.told("live", "slow");
    assert_eq!(apps.get("/slow").status, 200);
    // over one that is live, too
    let before = apps.listed("slow")["version"].clone();
    let mut file = fs::File::create(apps.path("slow.wasm")).unwrap();
    file.write_all(first).unwrap();
    apps.live("other", guest(HELLO_HTTP));
    assert_eq!((apps.get("/slow").status, &apps.listed("slow")["version"]), (200, &before));
    assert_eq!(apps.listed("slow")["error"], Value::Null);
    file.write_all(&variant(HELLO_HTTP, 1)[first.len()..]).unwrap();
    drop(file);
    let live = apps.told("live", "slow");
    assert_eq!(live["former"], before);
}

#[test]
fn a_file_may_come_in_any_way_that_files_come() {
    let mut apps = Apps::new();
    // written and then made readable
    let path = apps.path("modes.wasm");
    fs::write(&path, guest(HELLO_HTTP)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    apps.told("live", "modes");
    // a link to a file that is elsewhere, and one that replaces it
    fs::write(apps.folder.path("elsewhere"), guest(HELLO_HTTP)).unwrap();
    fs::hard_link(apps.folder.path("elsewhere"), apps.path("link.wasm")).unwrap();
    apps.told("live", "link");
    // as editors save: the old one is put aside, a new one is written, the old one removed
    fs::rename(apps.path("link.wasm"), apps.path("link.wasm~")).unwrap();
    fs::write(apps.path("link.wasm"), variant(HELLO_HTTP, 1)).unwrap();
    fs::remove_file(apps.path("link.wasm~")).unwrap();
    apps.told("live", "link");
    // a link within the folder, as mounted configurations have it
    fs::create_dir(apps.path("..data")).unwrap();
    fs::write(apps.path("..data/soft.wasm"), guest(HELLO_HTTP)).unwrap();
    std::os::unix::fs::symlink("..data/soft.wasm", apps.path("soft.wasm")).unwrap();
    apps.told("live", "soft");
    assert_eq!(apps.get("/").json()["apps"].as_array().unwrap().len(), 3);
    assert_eq!(events_of(apps, "removed").len(), 0);
}

/// Ends the program; all events of this name that were not taken.
#[track_caller]
fn events_of(apps: Apps, name: &str) -> Vec<Value> {
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    events(&finished).into_iter().filter(|event| event["event"] == name).collect()
}

#[test]
fn what_is_no_app_is_ignored_for_a_reason() {
    let mut apps = Apps::new();
    for name in [".hidden.wasm", "backup.wasm~", "#edited.wasm#", "half.wasm.part", "half.wasm.tmp", "README.md"] {
        apps.put(name, guest(HELLO_HTTP));
    }
    fs::write(apps.folder.path("outside.wasm"), guest(HELLO_HTTP)).unwrap();
    for (name, to) in [("out.wasm", "../outside.wasm"), ("root.wasm", "/proc/self/exe")] {
        std::os::unix::fs::symlink(to, apps.path(name)).unwrap();
        let ignored = event(&mut apps.server, "ignored");
        assert_eq!((&ignored["file"], &ignored["reason"]), (&json!(name), &json!("it is a link out of the folder")));
    }
    fs::create_dir(apps.path("folder.wasm")).unwrap();
    assert_eq!(event(&mut apps.server, "ignored")["reason"], "it is a folder");
    rustix::fs::mkfifoat(rustix::fs::CWD, apps.path("pipe.wasm"), 0o644.into()).unwrap();
    assert_eq!(event(&mut apps.server, "ignored")["reason"], "it is a special file");
    apps.put("bad name.wasm", guest(HELLO_HTTP));
    assert!(event(&mut apps.server, "ignored")["reason"].as_str().unwrap().starts_with("expected a name"));
    apps.live("good", guest(HELLO_HTTP));
    let names: Vec<_> =
        apps.get("/").json()["apps"].as_array().unwrap().iter().map(|app| app["name"].clone()).collect();
    assert_eq!(names, ["good"]);
}

#[test]
fn a_bad_version_changes_nothing_and_says_why() {
    let mut apps = Apps::new();
    let live = apps.live("app", guest(HELLO_HTTP));
    let worker = Who::says(&apps.get("/app")).pid;
    for (bad, reason) in [
        (b"junk".to_vec(), "found a text that is not WAT"),
        (guest(HELLO_HTTP)[..20_000].to_vec(), "unexpected end"),
        (vec![], "an empty file"),
        (guest(HELLO), "expected an http guest, found a command guest"),
        (guest(CRASH_AT_START), "a worker"),
    ] {
        apps.put("app.wasm", bad);
        let refused = apps.told("refused", "app");
        assert!(refused["reason"].as_str().unwrap().contains(reason), "{reason}: {refused}");
        assert_eq!(Who::says(&apps.get("/app")).pid, worker, "{reason}");
        let listed = apps.listed("app");
        assert_eq!((&listed["version"], &listed["error"]), (&live["version"], &refused["reason"]));
    }
    // the good one again: nothing is to be said of it any more
    apps.put("app.wasm", guest(HELLO_HTTP));
    eventually("its error is gone", || apps.listed("app")["error"].is_null());
    assert_eq!(Who::says(&apps.get("/app")).pid, worker);
    // one that was never live
    apps.put("new.wasm", guest(CRASH_AT_START));
    apps.told("refused", "new");
    assert_eq!(kind(&apps.get("/new")), (503, "not-live".into()));
    apps.live("new", guest(HELLO_HTTP));
    assert_eq!(apps.get("/new").status, 200);
}

#[test]
fn no_request_fails_when_a_guest_is_replaced() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    let load = Load::start_at(&apps.server, 8, "/app");
    load.until_more(200);
    for number in 0..10 {
        let live = apps.live("app", variant(HELLO_HTTP, number));
        // each answer after this event is of the new version
        let worker = Who::says(&apps.get("/app")).pid;
        load.until("the new one answers", |tally| tally.of(|who| who.pid == worker) > 20);
        assert_eq!(apps.listed("app")["version"], live["version"]);
    }
    load.stop().is_unharmed();
    // and the old ones have ended as they were asked to
    let exits = events_of(apps, "exit");
    assert!(exits.iter().all(|exit| exit["outcome"]["voluntary"] == true), "{exits:?}");
}

#[test]
fn whatever_happens_to_a_file_each_answer_is_of_a_version_that_was_live() {
    // more for those who have the time
    let changes = std::env::var("CHANGES").unwrap_or_else(|_| "30".into());
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(HELLO_HTTP));
    // another process, as installers are: two guests alternately, in ways that change at random
    let script = r#"
        state=$3
        for change in $(seq "$4"); do
            state=$(( (state * 1103515245 + 12345) % 2147483648 ))
            from=$([ $(( (state >> 16) % 2 )) = 0 ] && echo "$1" || echo "$2")
            case $(( (state >> 8) % 4 )) in
                0) cp "$from" .app.tmp && mv .app.tmp app.wasm ;;
                1) cp "$from" app.wasm ;;
                2) rm -f app.wasm; cp "$from" app.wasm ;;
                3) { head -c 1000 "$from"; sleep 0.05; tail -c +1001 "$from"; } > app.wasm ;;
            esac
            sleep 0.$(( state % 10 ))
        done
        cp "$1" app.wasm"#;
    let other = apps.folder.path("other.wasm");
    fs::write(&other, variant(HELLO_HTTP, 1)).unwrap();
    let load = Load::start_at(&apps.server, 4, "/app");
    let installer = Command::new("sh")
        .args(["-c", script, "sh", HELLO_HTTP])
        .arg(&other)
        .args(["7", &changes])
        .current_dir(apps.path(""))
        .status();
    assert!(installer.unwrap().success());
    // what is there at the end is live at the end
    let last = apps.live("last", guest(HELLO_HTTP))["version"].clone();
    eventually("it settles", || apps.listed("app")["version"] == last);
    let tally = load.stop();
    tally.is_unharmed();
    // the processes that answered are those of versions that went live
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    let events = events(&finished);
    let forked: BTreeSet<i64> =
        events.iter().filter(|event| event["event"] == "fork").filter_map(|event| event["pid"].as_i64()).collect();
    assert!(tally.answers.keys().all(|answer| forked.contains(&Who::of(answer).pid.into())), "{tally:?}");
    assert!(events.iter().filter(|event| event["event"] == "live").count() > 5, "{}", finished.stderr_text());
    assert!(events.iter().all(|event| event["event"] != "refused"), "{}", finished.stderr_text());
}

#[test]
fn events_that_were_lost_are_no_loss() {
    let queue: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    // while it stands still, more happens than the system remembers, and what is of interest last
    apps.server.signal(Signal::STOP);
    for _ in 0..=queue / 2 {
        fs::write(apps.path("noise.txt"), "x").unwrap();
    }
    fs::remove_file(apps.path("noise.txt")).unwrap();
    apps.put("app.wasm", variant(HELLO_HTTP, 1));
    apps.put("new.wasm", guest(HELLO_HTTP));
    apps.server.signal(Signal::CONT);
    let live: BTreeSet<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].to_string()).collect();
    assert_eq!(live.into_iter().collect::<Vec<_>>(), ["\"app\"", "\"new\""]);
    // and it is heard again
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn what_was_begun_is_finished_by_the_version_that_has_it() {
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(SLOW));
    let mut clients: Vec<Client> = (0..4).map(|_| apps.server.connect()).collect();
    for client in &mut clients {
        client.send_get("/app?ms=1500");
    }
    eventually("they are begun", || begun(&children(apps.server.pid())) == 4);
    apps.live("app", guest(HELLO_HTTP));
    assert_eq!(apps.get("/app").json()["worker"], 1);
    for client in &mut clients {
        assert_eq!(client.response().json(), json!({"slept": 1500}));
    }
    // one that takes longer than it may is cut off
    apps.server.signal(Signal::TERM);
    apps.server.running.wait().code(0);
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "300ms"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=20000");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    fs::remove_file(apps.path("app.wasm")).unwrap();
    assert_eq!(kind(&client.response()), (502, "worker".into()));
}

/// How many requests these processes have begun, but for the router, which is the first.
fn begun(workers: &[Pid]) -> u64 {
    let of = |worker: &Pid| {
        let files = fs::read_dir(format!("/proc/{}/fd", worker.as_raw_pid())).ok()?.flatten();
        let is_page = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.ends_with("memfd:wrun-page (deleted)"));
        let page = files.map(|file| file.path()).find(is_page)?;
        let words = fs::read(page).ok()?;
        Some(u64::from_ne_bytes(words[16..24].try_into().ok()?))
    };
    let mut workers = workers.to_vec();
    workers.sort_by_key(|pid| pid.as_raw_pid());
    workers.iter().skip(1).filter_map(of).sum()
}

#[test]
fn a_new_version_whose_workers_crash_is_taken_back() {
    let mut apps = Apps::new();
    let good = apps.live("app", guest(HELLO_HTTP));
    let bad = apps.live("app", variant(HELLO_HTTP, 1));
    for _ in 0..3 {
        let mut worker = Who::says(&apps.get("/app"));
        kill_process(Pid::from_raw(worker.pid).unwrap(), Signal::KILL).unwrap();
        // the next one is another
        let dead = worker.pid;
        eventually("it is replaced", || {
            let response = apps.get("/app");
            if response.status == 200 {
                worker = Who::says(&response);
            }
            worker.pid != dead
        });
    }
    let back = apps.told("rolled-back", "app");
    assert_eq!((&back["version"], &back["to"]), (&bad["version"], &good["version"]));
    assert_eq!(apps.told("live", "app")["version"], good["version"]);
    let listed = apps.listed("app");
    assert_eq!(listed["version"], good["version"]);
    assert!(listed["error"].as_str().unwrap().contains("crashed again and again"), "{listed}");
    // it is not tried again, but the good one is welcome, and any other
    apps.put("app.wasm", guest(HELLO_HTTP));
    eventually("its error is gone", || apps.listed("app")["error"].is_null());
    apps.put("app.wasm", variant(HELLO_HTTP, 1));
    assert!(apps.told("refused", "app")["reason"].as_str().unwrap().contains("crashed again and again"));
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn workers_that_are_replaced_or_die_between_requests_lose_none() {
    let mut apps = Apps::new();
    apps.put("app.toml", "max-requests = 50\nworkers = 2\n");
    apps.live("app", guest(HELLO_HTTP));
    let load = Load::start_at(&apps.server, 8, "/app");
    load.until("generation 6 of each slot", |tally| {
        (1..=2).all(|worker| tally.of(|who| who.worker == worker && who.generation >= 6) > 0)
    });
    load.stop().is_unharmed();
    // one that is killed when nobody asks it for anything
    apps.put("app.toml", "workers = 1\n");
    apps.told("live", "app");
    let mut client = apps.server.connect();
    for generation in 1..=3 {
        client.send_get("/app");
        let who = Who::says(&client.response());
        assert_eq!(who.generation, generation);
        kill_process(Pid::from_raw(who.pid).unwrap(), Signal::KILL).unwrap();
        assert!(gone(Pid::from_raw(who.pid).unwrap()));
    }
}

#[test]
fn settings_say_what_an_app_may_and_where_it_is() {
    let mut apps = Apps::new();
    apps.put("shop.toml", "route = '/a/shop'\nworkers = 2\nmemory = '32MiB'\n");
    let live = apps.live("shop", guest(UPLOAD));
    assert_eq!(apps.get("/a/shop/x").json()["path"], "/x");
    assert_eq!((apps.get("/shop").status, apps.get("/a").status), (404, 404));
    assert_eq!(apps.listed("shop")["workers"], 2);
    // a change of them is a new version of the app
    apps.put("shop.toml", "host = 'shop.example'\n");
    let other = apps.told("live", "shop");
    assert_eq!(other["former"], live["version"]);
    assert_eq!(apps.get("/a/shop").status, 404);
    let seen = apps.server.request("GET /x HTTP/1.1\r\nHost: Shop.Example:80\r\nConnection: close\r\n\r\n");
    assert_eq!((&seen.json()["path"], &seen.json()["authority"]), (&json!("/x"), &json!("Shop.Example:80")));
    // what is wrong in them is told with its place, and changes nothing
    apps.put("shop.toml", "host = 'shop.example'\nwrokers = 2\n");
    let refused = apps.told("refused", "shop");
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.starts_with("`shop.toml`: line 2, column 1: unknown field `wrokers`"), "{reason}");
    assert!(
        reason.contains("did you mean `workers`?") && reason.ends_with("2 | wrokers = 2\n    | ^^^^^^^"),
        "{reason}"
    );
    assert_eq!(apps.server.request("GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n").status, 200);
    // a place can be taken once
    apps.put("other.toml", "host = 'shop.example'\n");
    apps.put("other.wasm", guest(HELLO_HTTP));
    assert_eq!(apps.told("refused", "other")["reason"], "the app `shop` is at `shop.example` already");
    // until it is free
    apps.put("shop.toml", "route = '/a/shop'\n");
    let mut live: Vec<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].clone()).collect();
    live.sort_by_key(ToString::to_string);
    assert_eq!(live, ["other", "shop"]);
    // one that has what no other has
    apps.put("other.toml", "route = '/'\n");
    apps.told("live", "other");
    assert_eq!((apps.get("/").json()["worker"].clone(), apps.get("/any/where").status), (json!(1), 200));
    apps.put("other.toml", "disabled = true\n");
    apps.told("removed", "other");
    assert_eq!((&apps.listed("other")["state"], apps.get("/any/where").status), (&json!("disabled"), 404));
    apps.put("lost.toml", "");
    let refused = apps.told("refused", "lost");
    assert_eq!(refused["reason"], "there is no `lost.wasm` and no `lost.wat` for its settings");
}

#[test]
fn an_app_has_what_its_settings_grant_and_no_more() {
    let mut apps = Apps::new();
    fs::create_dir(apps.folder.path("data")).unwrap();
    fs::write(apps.folder.path("data/words.txt"), "granted").unwrap();
    // nothing by default
    apps.live("app", guest(HOSTILE));
    let read = json!({"do": "read", "path": "/data/words.txt"}).to_string();
    assert!(apps.server.post("/app", &read).json()["error"].is_string());
    apps.put("app.toml", "dir = ['../data::/data:ro']\n");
    apps.told("live", "app");
    let answer = apps.server.post("/app", &read);
    assert_eq!((answer.status, answer.json()), (200, json!({"text": "granted"})));
    let write = json!({"do": "write", "path": "/data/words.txt", "text": "x"}).to_string();
    assert!(apps.server.post("/app", write).json()["error"].is_string());
    // a folder that is not there
    apps.put("app.toml", "dir = ['nowhere::/data']\n");
    let refused = apps.told("refused", "app");
    assert!(refused["reason"].as_str().unwrap().contains("nowhere"), "{refused}");
}

#[test]
fn a_command_runs_once_for_each_request_when_its_settings_say_so() {
    let mut apps = Apps::new();
    apps.put("cat.wasm", guest(CAT));
    let reason = apps.told("refused", "cat")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("expected an http guest, found a command guest"), "{reason}");
    apps.put("cat.toml", "mode = 'command'\nbody-max = '1MiB'\n");
    assert!(apps.told("refused", "cat")["reason"].as_str().unwrap().contains("unknown field `body-max`"));
    apps.put("cat.toml", "mode = 'command'\nstdout-max = '1000B'\nworkers = 2\n");
    apps.told("live", "cat");
    let answer = apps.server.post("/cat", "some text\n");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    assert_eq!(answer.text(), "some text\n");
    let answer = apps.server.post("/cat", [0xff, 0]);
    assert_eq!((answer.body, answer.headers[0].1.as_str()), (vec![0xff, 0], "application/octet-stream"));
    assert_eq!((apps.get("/cat").status, apps.get("/cat").text()), (200, String::new()));
    assert_eq!(apps.server.post("/cat", vec![b'x'; 1000]).text().len(), 1000);
    assert_eq!(kind(&apps.server.post("/cat", vec![b'x'; 1001])), (500, "limit".into()));
    // a core module as well, which learns of the request, and of nothing else that was not given to it
    apps.put(
        "args.toml",
        "mode = 'command'\ncontent-type = 'application/json'\nargs = ['a b']\n[env]\nMINE = '1'\nREMOTE_ADDR = 'x'\n",
    );
    apps.live("args", guest(ARGS_P1));
    let head = "PUT /args/x%20y?q=1 HTTP/1.1\r\nHost: a\r\nProxy: evil\r\nContent-Type: text/x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    let answer = apps.server.request(head);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let env = json!({
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_METHOD": "PUT", "PATH_INFO": "/x%20y",
        "QUERY_STRING": "q=1", "REMOTE_ADDR": "x", "CONTENT_LENGTH": "2", "CONTENT_TYPE": "text/x", "MINE": "1",
    });
    assert_eq!(answer.json(), json!({"args": ["args", "a b"], "env": env}));
    // whatever becomes of a run, the next one is another
    for (args, status, found) in [
        ("['exit', '0']", 200, ""),
        ("['exit', '3']", 500, "exited"),
        ("['trap']", 500, "trapped"),
        ("['spin']", 504, "limit"),
        ("['grow', '10']", 200, ""),
        ("['grow', '80']", 500, "limit"),
    ] {
        apps.put("act.toml", format!("mode = 'command'\ntimeout = '300ms'\nmemory = '64MiB'\nargs = {args}\n"));
        if apps.path("act.wasm").exists() {
            apps.told("live", "act");
        } else {
            apps.live("act", guest(HOSTILE_COMMAND_P1));
        }
        for _ in 0..2 {
            let answer = apps.get("/act");
            assert_eq!(answer.status, status, "{args}: {answer:?}");
            if status != 200 {
                assert_eq!(kind(&answer).1, found, "{args}");
            }
        }
    }
    // and one that never reads its input does not wait for it
    apps.put("act.toml", "mode = 'command'\nargs = ['stderr', 'to the log']\n");
    apps.told("live", "act");
    assert_eq!(apps.server.post("/act", vec![b'x'; 3 << 20]).text(), "");
    let output = apps.told("output", "act");
    assert_eq!((&output["line"], &output["stream"]), (&json!("to the log"), &json!("stderr")));
}

#[test]
fn limits_of_an_app_hold() {
    let mut apps = Apps::new();
    apps.put("slow.toml", "timeout = '300ms'\n");
    apps.live("slow", guest(SLOW));
    assert_eq!(apps.get("/slow?ms=10").status, 200);
    assert_eq!(kind(&apps.get("/slow?ms=5000")), (504, "limit".into()));
    apps.put("crash.toml", "memory = '64MiB'\n");
    apps.live("crash", guest(CRASH));
    assert_eq!(apps.get("/crash/memory?mib=30").status, 200);
    assert_eq!(apps.get("/crash/memory?mib=80").status, 500);
    apps.put("echo.toml", "message-max = '10B'\n");
    apps.live("echo", guest(ECHO));
    assert_eq!(
        (apps.server.post("/echo", "12345678").status, apps.server.post("/echo", "12345678901").status),
        (200, 413)
    );
}

#[test]
fn the_limits_of_a_port_hold_at_the_router() {
    let flags = ["--header-max", "4KiB", "--uri-max", "100B", "--body-max", "1000B", "--header-timeout", "300ms"];
    let mut apps = Apps::with(|wrun| wrun.args(flags));
    apps.live("up", guest(UPLOAD));
    let get = |path: &str, more: &str| {
        apps.server.request(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{more}Connection: close\r\n\r\n")).status
    };
    // of what no app is asked for, too
    for app in ["/up", "/no"] {
        let found = if app == "/up" { 200 } else { 404 };
        assert_eq!(get(&format!("{app}?{}", "x".repeat(96)), ""), found);
        assert_eq!(get(&format!("{app}?{}", "x".repeat(97)), ""), 414);
        assert_eq!(get(app, &format!("x: {}\r\n", "x".repeat(3000))), found);
        assert_eq!(get(app, &format!("x: {}\r\n", "x".repeat(5000))), 431);
    }
    assert_eq!(apps.server.post("/up", vec![b'x'; 1000]).json()["bytes"], 1000);
    assert_eq!(kind(&apps.server.post("/up", vec![b'x'; 1001])), (413, "too-large".into()));
    // one that does not say how long it is
    let chunked = |count: usize| {
        let head = "POST /up HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunks: String = (0..count).map(|_| format!("64\r\n{}\r\n", "x".repeat(100))).collect();
        apps.server.request(format!("{head}{chunks}0\r\n\r\n"))
    };
    assert_eq!(chunked(10).json()["bytes"], 1000);
    assert_eq!(chunked(11).status, 413);
    // what can be read in two ways is read in none
    for smuggled in [
        "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        "GET /up HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ] {
        assert_eq!(apps.server.request(smuggled).status, 400, "{smuggled}");
    }
    assert_eq!(apps.server.request("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nConnection: close\r\n\r\n").status, 501);
    // whoever dawdles is cut off
    let mut client = apps.server.connect();
    client.send("GET /up HTTP/1.1\r\nHo");
    assert_eq!(client.response().status, 408);
}

#[test]
fn an_app_hears_whom_the_router_speaks_for() {
    let mut apps = Apps::new();
    apps.live("up", guest(UPLOAD));
    let forged = "GET /up/x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\n\
        X-Forwarded-Prefix: /forged\r\nX-Request-Id: mine\r\nKeep-Alive: 1\r\nX-Once: 1\r\nConnection: close, x-once\r\n\r\n";
    let response = apps.server.request(forged);
    let seen = response.json();
    let headers: Vec<(String, String)> = serde_json::from_value(seen["headers"].clone()).unwrap();
    let header =
        |name: &str| headers.iter().filter(|(header, _)| header == name).map(|(_, value)| &**value).collect::<Vec<_>>();
    assert_eq!((header("x-forwarded-for"), header("x-forwarded-prefix")), (vec!["127.0.0.1"], vec!["/up"]));
    assert_eq!((header("x-forwarded-proto"), header("x-forwarded-host")), (vec!["http"], vec!["a"]));
    assert_eq!(header("x-request-id"), [response.header("x-request-id").unwrap()]);
    assert_ne!(header("x-request-id"), ["mine"]);
    for gone in ["keep-alive", "x-once"] {
        assert_eq!(header(gone), Vec::<&str>::new(), "{gone}");
    }
    assert_eq!((&seen["scheme"], &seen["authority"]), (&json!("HTTP"), &json!("a")));
    // a proxy that is trusted is believed
    let mut apps = Apps::with(|wrun| wrun.args(["--trust-proxy", "127.0.0.1", "--access-log"]));
    apps.live("up", guest(UPLOAD));
    let seen = apps.server.request(forged).json();
    assert_eq!(seen["scheme"], "HTTPS");
    let record = event(&mut apps.server, "access");
    assert_eq!((&record["client"], &record["app"], &record["id"]), (&json!("9.9.9.9"), &json!("up"), &json!("mine")));
    assert_eq!((&record["target"], &record["status"]), (&json!("/up/x"), &json!(200)));
    assert_eq!(record["version"], apps.listed("up")["version"]);
}

#[test]
fn one_that_is_lazy_starts_with_its_first_request() {
    let mut apps = Apps::with(|wrun| wrun.arg("--lazy"));
    apps.put("app.wasm", guest(HELLO_HTTP));
    apps.told("asleep", "app");
    assert_eq!((&apps.listed("app")["state"], children(apps.server.pid()).len()), (&json!("asleep"), 1), "the router");
    let mut clients: Vec<Client> = (0..8).map(|_| apps.server.connect()).collect();
    for client in &mut clients {
        client.send_get("/app");
    }
    assert!(clients.iter_mut().all(|client| client.response().status == 200));
    assert_eq!(apps.listed("app")["state"], "live");
    // one that does not start, and one whose file says that it is not lazy
    apps.put("bad.wasm", guest(CRASH_AT_START));
    apps.told("asleep", "bad");
    assert_eq!(kind(&apps.get("/bad")), (503, "not-live".into()));
    assert_eq!(kind(&apps.get("/bad")), (503, "not-live".into()));
    apps.put("eager.toml", "lazy = false");
    apps.live("eager", guest(HELLO_HTTP));
}

#[test]
fn the_router_is_replaced_when_it_dies() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    let worker = Who::says(&apps.get("/app")).pid;
    let router = children(apps.server.pid()).into_iter().find(|child| child.as_raw_pid() != worker).unwrap();
    kill_process(router, Signal::KILL).unwrap();
    assert!(gone(router));
    // whoever comes meanwhile waits at the port
    assert_eq!(Who::says(&apps.get("/app")).pid, worker, "apps go on");
    assert_eq!(apps.listed("app")["state"], "live");
    apps.live("app", variant(HELLO_HTTP, 1));
    assert_ne!(Who::says(&apps.get("/app")).pid, worker);
}

#[test]
fn the_router_is_in_a_jail_of_its_own() {
    let mut apps = Apps::with(|wrun| wrun.args(["--isolation", "jail"]));
    let fork = pid(&children(apps.server.pid()).first().map(|pid| json!(pid.as_raw_pid())).unwrap());
    let status = fs::read_to_string(format!("/proc/{}/status", fork.as_raw_pid())).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((&*field("Seccomp:"), &*field("NoNewPrivs:")), ("2", "1"));
    assert_eq!(field("CapEff:"), "0000000000000000");
    apps.live("app", guest(HELLO_HTTP));
    assert_eq!(apps.get("/app").status, 200);
}

#[test]
fn the_folder_may_go_and_come_back() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    // swapped for another in less time than it takes to notice
    let next = apps.folder.path("next");
    fs::create_dir(&next).unwrap();
    fs::write(next.join("app.wasm"), variant(HELLO_HTTP, 1)).unwrap();
    let load = Load::start_at(&apps.server, 4, "/app");
    load.until_more(20);
    fs::rename(apps.folder.path("apps"), apps.folder.path("old")).unwrap();
    fs::rename(&next, apps.folder.path("apps")).unwrap();
    apps.told("live", "app");
    load.stop().is_unharmed();
    // gone for good, and back
    fs::rename(apps.folder.path("apps"), &next).unwrap();
    apps.told("removed", "app");
    assert_eq!(apps.get("/app").status, 404);
    fs::rename(&next, apps.folder.path("apps")).unwrap();
    apps.told("live", "app");
    // and it is still watched
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn a_folder_without_events_is_looked_at() {
    let mut apps = Apps::with(|wrun| wrun.args(["--poll", "50ms"]));
    apps.live("app", guest(HELLO_HTTP));
    apps.live("app", variant(HELLO_HTTP, 1));
    fs::remove_file(apps.path("app.wasm")).unwrap();
    apps.told("removed", "app");
}

#[test]
fn a_kernel_without_events_is_none_that_wrun_needs() {
    let calls = [libc::SYS_inotify_init1, libc::SYS_inotify_init];
    let mut apps = Apps::with(|wrun| wrun.on_a_kernel_without(&calls));
    apps.live("app", guest(HELLO_HTTP));
    apps.live("app", variant(HELLO_HTTP, 1));
}

#[test]
fn a_hangup_lets_everything_be_tried_again() {
    let mut apps = Apps::new();
    apps.put("app.toml", "dir = ['../later::/data']\n");
    apps.put("app.wasm", guest(HELLO_HTTP));
    apps.told("refused", "app");
    fs::create_dir(apps.folder.path("later")).unwrap();
    apps.server.signal(Signal::HUP);
    apps.told("live", "app");
    assert_eq!(apps.get("/app").status, 200);
}

#[test]
fn many_files_may_come_at_once() {
    const MANY: usize = 1000;
    let mut apps = Apps::with(|wrun| wrun.arg("--lazy"));
    let echo = guest(ECHO);
    for number in 0..MANY {
        fs::write(apps.path(&format!("app{number}.wasm")), &echo).unwrap();
    }
    for _ in 0..MANY {
        event(&mut apps.server, "asleep");
    }
    eventually("all are listed", || apps.get("/").json()["apps"].as_array().unwrap().len() == MANY);
    for number in [0, 500, 999] {
        assert_eq!(apps.server.post(&format!("/app{number}"), "1").text(), "1");
    }
}

#[test]
fn more_apps_than_there_are_descriptors_for_are_refused_and_the_others_go_on() {
    const MANY: usize = 20;
    let apps = Apps::with(|wrun| wrun.open_files(110));
    for number in 0..MANY {
        apps.put(&format!("app{number}.wasm"), guest(ECHO));
    }
    let states = || {
        let list = apps.get("/").json();
        let apps = list["apps"].as_array().unwrap().iter();
        apps.map(|app| (app["name"].as_str().unwrap().to_owned(), app["state"] == "live", app.clone()))
            .collect::<Vec<_>>()
    };
    let is_settled = |(_, is_live, app): &(String, bool, Value)| *is_live || app["error"].is_string();
    eventually("each is live or was refused", || states().len() == MANY && states().iter().all(is_settled));
    let states = states();
    let live = states.iter().filter(|(_, is_live, _)| *is_live).count();
    assert!(0 < live && live < MANY, "{live} of {MANY}");
    for (name, is_live, app) in states {
        let answer = apps.server.post(&format!("/{name}"), "1");
        assert_eq!(answer.status, if is_live { 200 } else { 503 }, "{app}");
        assert!(is_live || app["error"].as_str().unwrap().contains("open files"), "{app}");
    }
}

#[test]
fn replacing_costs_nothing_that_stays() {
    // more for those who have the time
    let times = std::env::var("REPLACEMENTS").map_or(40, |times| times.parse().unwrap());
    let mut apps = Apps::new();
    let router = children(apps.server.pid())[0];
    // with a mebibyte that would be missed
    let padded = |number: u8| [variant(HELLO_HTTP, number), vec![0, 0x80, 0x80, 0x40], vec![0; 1 << 20]].concat();
    let replace = |apps: &mut Apps, times: u32| {
        for number in 0..times {
            apps.live("app", padded((number % 2) as u8));
            assert_eq!(apps.get("/app").status, 200);
        }
        // those that were taken over from are gone
        eventually("the last is live alone", || children(apps.server.pid()).len() == 2);
    };
    let count = |pid: Pid, what: &str| fs::read_dir(format!("/proc/{}/{what}", pid.as_raw_pid())).unwrap().count();
    let memory_kib = |pid: Pid| -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let pid = apps.server.pid();
    let spent = || format!("{:?}", (count(pid, "fd"), count(pid, "task"), count(router, "fd")));
    // both are compiled then
    replace(&mut apps, 4);
    apps.server.running.until_stable("descriptors and threads", spent);
    let (before, memory) = (spent(), [pid, router].map(memory_kib));
    replace(&mut apps, times);
    apps.server.running.until_stable("descriptors and threads", spent);
    assert_eq!(spent(), before);
    let grown = [pid, router].map(memory_kib);
    assert!(grown[0] < memory[0] + (16 << 10) && grown[1] < memory[1] + (4 << 10), "{memory:?} KiB, then {grown:?}");
}

#[test]
fn a_signal_lets_requests_finish_and_a_second_one_does_not() {
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=700");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    apps.server.signal(Signal::TERM);
    eventually("nobody is let in", || Client::try_connect(apps.server.address).is_err());
    assert_eq!(client.response().json(), json!({"slept": 700}));
    apps.server.running.wait().code(0);

    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "60s"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=60000");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    let (start, workers) = (Instant::now(), children(apps.server.pid()));
    apps.server.signal(Signal::TERM);
    eventually("nobody is let in", || Client::try_connect(apps.server.address).is_err());
    apps.server.signal(Signal::TERM);
    apps.server.running.wait().code(143);
    assert!(start.elapsed() < Duration::from_secs(30) && workers.into_iter().all(gone));
}

#[test]
fn inspect_says_what_would_be_served_and_why_not_the_rest() {
    let folder = Folder::new()
        .file("apps/good.wasm", guest(HELLO_HTTP))
        .file("apps/shop.wasm", guest(ECHO))
        .file("apps/shop.toml", "route = '/a/b'")
        .file("apps/.hidden.wasm", "")
        .link("apps/out.wasm", "/proc/self/exe");
    let text = folder.wrun(["inspect", "apps"]).run().code(0).stdout_text();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("good: version ") && lines[0].ends_with(" at /good"), "{text}");
    assert!(lines[1].starts_with("shop: version ") && lines[1].ends_with(" at /a/b"), "{text}");
    let ignored =
        [".hidden.wasm: ignored: its name starts with a dot", "out.wasm: ignored: it is a link out of the folder"];
    assert_eq!(lines[2..], ignored);
    let folder = folder
        .file("apps/bad.wasm", "junk")
        .file("apps/twice.wasm", guest(ECHO))
        .file("apps/twice.toml", "route = '/good'")
        .file("apps/wrong.wasm", guest(HELLO))
        .file("apps/off.wasm", guest(ECHO))
        .file("apps/off.toml", "disabled = true")
        .file("apps/typo.wasm", guest(ECHO))
        .file("apps/typo.toml", "memroy = '1MiB'");
    let found = folder.wrun(["inspect", "apps", "--json"]).run().code(2);
    let found: Value = serde_json::from_str(&found.stdout_text()).unwrap();
    let refused = |name: &str| {
        let app = found["apps"].as_array().unwrap().iter().find(|app| app["name"] == name).unwrap();
        app["refused"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!((refused("good"), refused("shop")), (String::new(), String::new()));
    assert!(refused("bad").contains("not WAT") && refused("wrong").contains("`mode = \"command\"`"));
    assert_eq!(refused("twice"), "another app is at `/good` already");
    assert_eq!(refused("off"), "it is disabled");
    assert!(refused("typo").contains("did you mean `memory`?"), "{}", refused("typo"));
}

#[test]
fn what_cannot_be_watched_is_told() {
    let folder = Folder::new().file("file", "");
    for path in ["nowhere", "file"] {
        let _ = folder.wrun(["watch", path, "--listen", "0"]).run().code(125).stderr_has("could not read the folder");
    }
    let apps = Apps::new();
    let taken = apps.server.address.to_string();
    let _ = apps.folder.wrun(["watch", "apps", "--listen", &taken]).run().code(98);
    let _ = folder.wrun(["watch", ".", "--poll", "1ms"]).run().code(2).stderr_has("expected 10ms or more");
    let _ =
        folder.wrun(["watch", ".", "--isolation", "thread"]).run().code(2).stderr_has("expected `process` or `jail`");
}
