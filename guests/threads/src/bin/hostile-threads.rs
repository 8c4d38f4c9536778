//! Does with threads what its first argument tells it to, and most of that is what no guest should do.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const USAGE: &str = "\
wait            four threads wait for ever, and so does main
spin            two threads loop for ever, and so does main
sleep           two threads sleep for an hour, and so does main
read            a thread waits for input while another prints; then prints what it read
trap            the third thread traps, while others wait
panic           the second thread panics, while others wait
exit            the second thread exits with code 7, while others wait
main-ends       main returns while a thread loops
bomb            makes threads until there are no more, and prints how many and why
reuse N         makes N threads, one after the other
recurse         a thread calls itself without end
grow            a thread takes memory without end
race            four threads write to the same bytes, without any order
count N         four threads add N to a counter each, by a mutex and by an atomic, and main prints both
lines N         eight threads print N lines each
files DIR       files that were opened before and after a thread was made are there for both
clock           sleeping takes as long as it should, for threads at once
pthreads        four threads that are made as C makes them add to a counter
tls             thread-local variables are each thread's own
storm           threads that are made, wait, and wake each other, for ever";

fn main() {
    let mut args = std::env::args().skip(1);
    let act = args.next().unwrap_or_default();
    let argument = args.next();
    let number = || argument.as_deref().and_then(|text| text.parse::<u64>().ok()).expect("a number");
    match &*act {
        "wait" => {
            crowd(4, |_| wait_for_ever());
            wait_for_ever();
        }
        "spin" => {
            crowd(2, |_| spin());
            spin();
        }
        "sleep" => {
            crowd(2, |_| thread::sleep(Duration::from_hours(1)));
            thread::sleep(Duration::from_hours(1));
        }
        "read" => read(),
        "trap" => fail_in(3, || process::abort()),
        "panic" => fail_in(2, || panic!("on purpose")),
        "exit" => fail_in(2, || process::exit(7)),
        "main-ends" => crowd(1, |_| spin()),
        "bomb" => bomb(),
        "reuse" => {
            for _ in 0..number() {
                thread::spawn(|| {}).join().expect("it does not panic");
            }
            println!("done");
        }
        "recurse" => {
            println!("{}", thread::spawn(|| recurse(0)).join().expect("it does not panic"));
        }
        "grow" => {
            thread::spawn(grow).join().expect("it does not panic");
        }
        "race" => race(),
        "count" => count(number()),
        "lines" => lines(number()),
        "files" => files(argument.expect("a folder")).expect("files work"),
        "clock" => clock(),
        "tls" => tls(),
        "pthreads" => pthreads(),
        "storm" => storm(),
        _ => {
            eprintln!("{USAGE}");
            process::exit(2);
        }
    }
}

/// Makes threads, and waits until all of them run.
fn crowd(count: u32, act: impl Fn(u32) + Send + Sync + 'static) {
    let (act, barrier) = (Arc::new(act), Arc::new(Barrier::new(count as usize + 1)));
    for number in 1..=count {
        let (act, barrier) = (act.clone(), barrier.clone());
        thread::spawn(move || {
            barrier.wait();
            // not before the line below is out: what exits ends `println!` between its writes
            barrier.wait();
            act(number);
        });
    }
    barrier.wait();
    println!("{count} threads run");
    barrier.wait();
}

fn wait_for_ever() {
    let (mutex, condvar) = (Mutex::new(()), Condvar::new());
    let guard = mutex.lock().expect("nobody panics");
    let _guard = condvar.wait_while(guard, |()| true);
}

fn spin() {
    loop {
        black_box(());
    }
}

fn fail_in(which: u32, fail: impl Fn() + Send + Sync + 'static) {
    crowd(4, move |number| {
        if number == which {
            fail();
        }
        wait_for_ever();
    });
    wait_for_ever();
}

fn read() {
    let (said, heard) = mpsc::channel();
    let reader = thread::spawn(move || {
        said.send(()).expect("main listens");
        let mut text = String::new();
        std::io::stdin().read_line(&mut text).expect("a line");
        text
    });
    heard.recv().expect("the reader runs");
    println!("another thread prints");
    println!("read {:?}", reader.join().expect("it does not panic").trim_end());
}

fn bomb() {
    let mut threads = vec![];
    let error = loop {
        match thread::Builder::new().stack_size(64 << 10).spawn(wait_for_ever) {
            Ok(thread) => threads.push(thread),
            Err(error) => break error,
        }
    };
    println!("{} threads, then: {error}", threads.len());
}

#[expect(unconditional_recursion, reason = "on purpose")]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 16]);
    recurse(depth + 1) + frame[3]
}

fn grow() {
    let mut kept = vec![];
    loop {
        kept.push(black_box(vec![1u8; 1 << 20]));
    }
}

fn race() {
    static BYTES: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
    let writers: Vec<_> = (1..=4u64)
        .map(|writer| {
            thread::spawn(move || {
                for round in 0..1_000_000u64 {
                    BYTES[usize::try_from(round % 8).expect("small")].store(writer, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.join().expect("it does not panic");
    }
    let whole = BYTES.iter().all(|word| (1..=4).contains(&word.load(Ordering::Relaxed)));
    println!("every word is one writer's: {whole}");
}

fn count(each: u64) {
    static ATOMIC: AtomicU64 = AtomicU64::new(0);
    let locked = Arc::new(Mutex::new(0u64));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let locked = locked.clone();
            thread::spawn(move || {
                for _ in 0..each {
                    ATOMIC.fetch_add(1, Ordering::Relaxed);
                    *locked.lock().expect("nobody panics") += 1;
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("it does not panic");
    }
    println!("{} {}", ATOMIC.load(Ordering::Relaxed), locked.lock().expect("nobody panics"));
}

fn lines(each: u64) {
    thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || {
                for line in 0..each {
                    println!("thread {number} prints line {line} {}", "x".repeat(50));
                }
            });
        }
    });
}

fn files(dir: String) -> std::io::Result<()> {
    let (listed, path) = (dir.clone(), move |name: &str| format!("{dir}/{name}"));
    let mut before = File::options().read(true).write(true).create(true).truncate(true).open(path("before"))?;
    let (mut before, mut after) = thread::spawn(move || -> std::io::Result<_> {
        before.write_all(b"written by a thread")?;
        let mut after = File::options().read(true).write(true).create(true).truncate(true).open(path("after"))?;
        after.write_all(b"opened by a thread")?;
        Ok((before, after))
    })
    .join()
    .expect("it does not panic")?;
    for file in [&mut before, &mut after] {
        file.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        println!("{text}");
    }
    let names = fs::read_dir(listed)?.map(|entry| Ok(entry?.file_name().into_string().expect("UTF-8")));
    let mut names: Vec<_> = names.collect::<std::io::Result<_>>()?;
    names.sort();
    println!("{}", names.join(" "));
    Ok(())
}

fn clock() {
    let started = Instant::now();
    let sleepers: Vec<_> = (0..8).map(|_| thread::spawn(|| thread::sleep(Duration::from_millis(200)))).collect();
    for sleeper in sleepers {
        sleeper.join().expect("it does not panic");
    }
    let took = started.elapsed();
    println!("{}", took >= Duration::from_millis(200) && took < Duration::from_millis(1500));
}

fn tls() {
    thread_local! {
        static OWN: Cell<u32> = const { Cell::new(0) };
    }
    let sums: Vec<_> = (1..=4)
        .map(|number| {
            thread::spawn(move || {
                (0..1000).for_each(|_| OWN.set(OWN.get() + number));
                OWN.get()
            })
        })
        .collect();
    let sums: Vec<_> = sums.into_iter().map(|sum| sum.join().expect("it does not panic")).collect();
    println!("{sums:?} {}", OWN.get());
}

/// What a C program does: the very functions, without the library of Rust around them.
fn pthreads() {
    unsafe extern "C" {
        fn pthread_create(
            thread: *mut usize,
            attributes: *const c_void,
            start: extern "C" fn(*mut c_void) -> *mut c_void,
            argument: *mut c_void,
        ) -> c_int;
        fn pthread_join(thread: usize, returned: *mut *mut c_void) -> c_int;
        fn pthread_mutex_lock(mutex: *mut Mutex) -> c_int;
        fn pthread_mutex_unlock(mutex: *mut Mutex) -> c_int;
    }

    /// As large as one of the C library's, which is made of zeros.
    #[repr(C, align(8))]
    struct Mutex([u8; 64]);

    struct Shared {
        mutex: Mutex,
        count: u32,
    }

    extern "C" fn work(shared: *mut c_void) -> *mut c_void {
        let shared = shared.cast::<Shared>();
        for _ in 0..10_000 {
            // SAFETY: main keeps it until all threads are joined, and the count is changed by who has the mutex
            unsafe {
                pthread_mutex_lock(&raw mut (*shared).mutex);
                (*shared).count += 1;
                pthread_mutex_unlock(&raw mut (*shared).mutex);
            }
        }
        shared.cast()
    }

    let shared = Box::into_raw(Box::new(Shared { mutex: Mutex([0; 64]), count: 0 }));
    let mut threads = [0; 4];
    for thread in &mut threads {
        // SAFETY: `work` gets what it expects
        assert_eq!(unsafe { pthread_create(thread, ptr::null(), work, shared.cast()) }, 0);
    }
    for thread in threads {
        let mut returned = ptr::null_mut();
        // SAFETY: each was made above, and is joined once
        assert_eq!(unsafe { pthread_join(thread, &raw mut returned) }, 0);
        assert_eq!(returned, shared.cast());
    }
    // SAFETY: nobody else has it any more
    println!("{}", unsafe { Box::from_raw(shared) }.count);
}

fn storm() {
    static TURN: AtomicU32 = AtomicU32::new(0);
    static RUNS: AtomicBool = AtomicBool::new(false);
    let shared = Arc::new((Mutex::new(0u64), Condvar::new()));
    loop {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || {
                    for _ in 0..1000 {
                        TURN.fetch_add(1, Ordering::Relaxed);
                        let mut count = shared.0.lock().expect("nobody panics");
                        *count += 1;
                        shared.1.notify_all();
                        drop(shared.1.wait_timeout(count, Duration::from_micros(50)));
                    }
                })
            })
            .collect();
        if !RUNS.swap(true, Ordering::Relaxed) {
            println!("the storm begins");
        }
        for thread in threads {
            thread.join().expect("it does not panic");
        }
    }
}
