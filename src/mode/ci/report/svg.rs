//! The pictures of the HTML report: the graph of the jobs, and the timeline of the slots.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
};

use super::html::{Escaped, class, duration, label, plural, sign};
use crate::mode::ci::record::{Attempt, JobRecord, RunRecord, Status};

/// More nodes than this are no picture that anyone can read.
const MAX_NODES: usize = 300;
/// More bars than this make browsers slow.
const MAX_BARS: usize = 5000;
/// Slots that did nothing get a lane too, but not more of them than this.
const MAX_IDLE_LANES: u32 = 64;

/// Which jobs need which, by their indices in the record.
struct Graph {
    needs: Vec<Vec<usize>>,
    users: Vec<Vec<usize>>,
}

impl Graph {
    fn of(run: &RunRecord) -> Self {
        let names: HashMap<&str, usize> = run.jobs.iter().enumerate().map(|(at, job)| (job.job.as_str(), at)).collect();
        let mut users = vec![Vec::new(); run.jobs.len()];
        let mut needs = Vec::with_capacity(run.jobs.len());
        for (at, job) in run.jobs.iter().enumerate() {
            let known = job.needs.iter().filter_map(|name| names.get(name.as_str()).copied());
            let found: BTreeSet<usize> = known.filter(|need| *need != at).collect();
            for &need in &found {
                users[need].push(at);
            }
            needs.push(found.into_iter().collect());
        }
        Self { needs, users }
    }

    /// The jobs that need others or are needed, each in the layer after the last that it needs. Jobs that need each
    /// other in a circle, which no run has, stay where they are found.
    fn layers(&self) -> Vec<Vec<usize>> {
        let mut layer = vec![0; self.needs.len()];
        let mut missing: Vec<usize> = self.needs.iter().map(Vec::len).collect();
        let mut ready: Vec<usize> = (0..layer.len()).filter(|at| missing[*at] == 0).collect();
        while let Some(at) = ready.pop() {
            for &user in &self.users[at] {
                layer[user] = layer[user].max(layer[at] + 1);
                missing[user] -= 1;
                if missing[user] == 0 {
                    ready.push(user);
                }
            }
        }
        let mut layers = Vec::new();
        for (at, &layer) in layer.iter().enumerate() {
            if !self.needs[at].is_empty() || !self.users[at].is_empty() {
                layers.resize_with(layers.len().max(layer + 1), Vec::new);
                layers[layer].push(at);
            }
        }
        layers
    }

    /// Column and row of each job. Jobs go near to those they are joined with, for fewer edges to cross.
    fn places(&self, layers: &mut [Vec<usize>]) -> Vec<(usize, usize)> {
        let height = layers.iter().map(Vec::len).max().unwrap_or(0);
        let mut places = vec![(0, 0); self.needs.len()];
        for sweep in 0..5 {
            let joined = if sweep % 2 == 0 { &self.needs } else { &self.users };
            for step in 0..layers.len() {
                let column = if sweep % 2 == 0 { step } else { layers.len() - 1 - step };
                let layer = &mut layers[column];
                if sweep > 0 || column > 0 {
                    layer.sort_by_cached_key(|at| match joined[*at].as_slice() {
                        [] => places[*at].1 * 64,
                        near => near.iter().map(|other| places[*other].1 * 64).sum::<usize>() / near.len(),
                    });
                }
                let top = (height - layer.len()) / 2;
                for (row, at) in layer.iter().enumerate() {
                    places[*at] = (column, top + row);
                }
            }
        }
        places
    }
}

/// The size of a node, and how far it is from one to the next.
const NODE: (usize, usize) = (190, 44);
const PITCH: (usize, usize) = (230, 62);

/// The graph, or why there is none.
pub(super) fn graph(page: &mut String, run: &RunRecord) {
    let graph = Graph::of(run);
    let mut layers = graph.layers();
    let (nodes, edges) = (layers.iter().map(Vec::len).sum::<usize>(), graph.needs.iter().map(Vec::len).sum::<usize>());
    if nodes == 0 {
        page.push_str("<p>There is no graph: no job needs another.</p>\n");
        return;
    }
    if nodes > MAX_NODES {
        let _ = writeln!(page, "<p>There is no graph: {nodes} jobs are too many for one (at most {MAX_NODES}).</p>");
        return;
    }
    let places = graph.places(&mut layers);
    let (width, height) = (layers.len() * PITCH.0 - PITCH.0 + NODE.0 + 24, layers.iter().map(Vec::len).max());
    let height = height.unwrap_or(0) * PITCH.1 + 12;
    let _ = writeln!(
        page,
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Job graph\">\n\
         <svg id=\"graph\" role=\"img\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         aria-label=\"{nodes} jobs from left to right, joined by {edges} needs; the table of jobs has them all\">"
    );
    for (at, need) in graph.needs.iter().enumerate().flat_map(|(at, needs)| needs.iter().map(move |need| (at, *need))) {
        edge(page, need, places[need], places[at]);
    }
    for &at in layers.iter().flatten() {
        let (job, x, y) = (&run.jobs[at], places[at].0 * PITCH.0 + 12, places[at].1 * PITCH.1 + 12);
        let ended = label(job.status, job.allow_failure);
        let ended = if job.attempts.is_empty() { ended } else { format!("{ended} · {}", duration(job.wall_ms())) };
        let _ = writeln!(
            page,
            "<a href=\"#job-{at}\" tabindex=\"-1\" class=\"{class}\"><title>{full}: {ended}</title>\
             <rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" rx=\"8\"/><text x=\"{tx}\" y=\"{}\">{name}</text>\
             <text x=\"{tx}\" y=\"{}\">{ended}</text></a>",
            NODE.0,
            NODE.1,
            y + 18,
            y + 35,
            class = class(job.status),
            full = Escaped(&job.job),
            name = Escaped(&cut(&job.job, 24)),
            tx = x + 10,
        );
    }
    page.push_str("</svg>\n</div>\n");
    if nodes < run.jobs.len() {
        let _ =
            writeln!(page, "<p class=\"m\">Not joined with any other: {}.</p>", plural(run.jobs.len() - nodes, "job"));
    }
}

/// A curve to the next layer, or one that takes the free space between two rows, for no node to hide it.
fn edge(page: &mut String, need: usize, from: (usize, usize), to: (usize, usize)) {
    let (x1, y1) = (from.0 * PITCH.0 + 12 + NODE.0, from.1 * PITCH.1 + 12 + NODE.1 / 2);
    let (x2, y2) = (to.0 * PITCH.0 + 12, to.1 * PITCH.1 + 12 + NODE.1 / 2);
    let bend = (PITCH.0 - NODE.0) / 2;
    let _ = if to.0 > from.0 + 1 {
        // what comes of one job keeps together, and off what comes of the next
        let middle = if to.1 < from.1 { y1 - PITCH.1 / 2 } else { y1 + PITCH.1 / 2 };
        let between = middle + need % 3 * 5 - 5;
        let (left, right) = (x1 + bend, x2 - bend);
        writeln!(
            page,
            "<path d=\"M{x1} {y1}C{left} {y1} {left} {between} {} {between}H{}\
             C{right} {between} {right} {y2} {x2} {y2}\"/>",
            left + bend,
            right - bend,
        )
    } else {
        writeln!(page, "<path d=\"M{x1} {y1}C{} {y1} {} {y2} {x2} {y2}\"/>", x1 + bend, x2.saturating_sub(bend))
    };
}

/// The timeline: its lanes begin here, are so long, and so far from one another.
const LANE: (u64, u64, usize) = (60, 1020, 26);

/// The timeline, or why there is none.
pub(super) fn timeline(page: &mut String, run: &RunRecord) {
    let attempts = || run.jobs.iter().enumerate().flat_map(|(at, job)| job.attempts.iter().map(move |a| (at, job, a)));
    let bars = attempts().count();
    if bars == 0 || bars > MAX_BARS {
        let _ = match bars {
            0 => writeln!(page, "<p>There is no timeline: no job was started.</p>"),
            _ => writeln!(
                page,
                "<p>There is no timeline: {bars} attempts are too many for one (at most {MAX_BARS}).</p>"
            ),
        };
        return;
    }
    let last = attempts().map(|(_, _, a)| a.times.start_ms.saturating_add(a.times.wall_ms)).max();
    let end = run.times.wall_ms.max(last.unwrap_or(0)).max(1);
    let mut lanes: BTreeSet<u32> = attempts().map(|(_, _, attempt)| attempt.times.slot).collect();
    lanes.extend(0..run.times.slots.min(MAX_IDLE_LANES));
    let lanes: Vec<u32> = lanes.into_iter().collect();
    let bottom = lanes.len() * LANE.2 + 4;
    let _ = writeln!(
        page,
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Timeline\">\n\
         <svg id=\"timeline\" role=\"img\" viewBox=\"0 0 1120 {}\" aria-label=\"{}: {} in {}\">",
        bottom + 24,
        plural(lanes.len(), "slot"),
        plural(bars, "attempt"),
        duration(end),
    );
    let step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 15_000, 30_000]
        .into_iter()
        .chain((0..50).map(|power| 60_000 << power))
        .find(|step| end / step <= 8)
        .unwrap_or(end);
    for at in (0..=end / step).map(|tick| tick * step) {
        let x = pixels(LANE.0 * 10 + scale(at, end));
        let _ = writeln!(
            page,
            "<line x1=\"{x}\" x2=\"{x}\" y1=\"2\" y2=\"{bottom}\"/>\
             <text class=\"dim\" x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 16,
            if at == 0 { "0".to_owned() } else { duration(at) },
        );
    }
    for (lane, slot) in lanes.iter().enumerate() {
        let _ = writeln!(
            page,
            "<text class=\"dim\" x=\"{}\" y=\"{}\" text-anchor=\"end\">slot {slot}</text>",
            LANE.0 - 8,
            lane * LANE.2 + 20
        );
    }
    for (at, job, attempt) in attempts() {
        bar(page, (at, job), attempt, lanes.partition_point(|slot| *slot < attempt.times.slot), end);
    }
    page.push_str("</svg>\n</div>\n");
}

fn bar(page: &mut String, (at, job): (usize, &JobRecord), attempt: &Attempt, lane: usize, end: u64) {
    let times = &attempt.times;
    let (x, width) = (LANE.0 * 10 + scale(times.start_ms, end), scale(times.wall_ms, end).max(20));
    let _ = write!(
        page,
        "<a href=\"#job-{at}\" tabindex=\"-1\" class=\"{}\"><title>{}, attempt {}: {}, {} from {}</title>\
         <rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"20\" rx=\"2\"/>",
        class(attempt.status),
        Escaped(&job.job),
        attempt.attempt,
        label(attempt.status, false),
        duration(times.wall_ms),
        duration(times.start_ms),
        pixels(x),
        lane * LANE.2 + 6,
        pixels(width),
    );
    // what is too short for its name shows its sign, for it not to be told by colour alone
    let room = usize::try_from(width / 70).unwrap_or(0);
    let (text, anchor, from) = match room {
        0..5 if attempt.status == Status::Pass => (String::new(), "", 0),
        0..5 => (sign(attempt.status).to_owned(), "middle", x + width / 2),
        _ => (format!("{} {}", sign(attempt.status), cut(&job.job, room - 3)), "start", x + 50),
    };
    if !text.is_empty() {
        let (from, y) = (pixels(from), lane * LANE.2 + 20);
        let _ = write!(page, "<text x=\"{from}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>", Escaped(&text));
    }
    page.push_str("</a>\n");
}

/// Where a time is in a lane, in tenths of a pixel.
fn scale(ms: u64, end: u64) -> u64 {
    u64::try_from(u128::from(ms.min(end)) * u128::from(LANE.1) * 10 / u128::from(end)).unwrap_or(0)
}

fn pixels(tenths: u64) -> String {
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// The begin of a text, of at most about so many letters; what is not ASCII may be twice as wide.
fn cut(text: &str, most: usize) -> String {
    let mut room = most;
    for (at, c) in text.char_indices() {
        match room.checked_sub(1 + usize::from(!c.is_ascii())) {
            Some(less) => room = less,
            None => return format!("{}…", &text[..at]),
        }
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::html::tests::{job, run};
    use super::*;

    #[test]
    fn jobs_are_layered_by_the_longest_path() {
        let jobs = vec![
            job("build", &[], Status::Pass),
            job("unit", &["build", "build", "unit", "nobody"], Status::Fail),
            job("lint", &[], Status::Pass),
            job("ship", &["build", "unit"], Status::Skipped),
        ];
        let graph = Graph::of(&run(jobs));
        assert_eq!(graph.needs, [vec![], vec![0], vec![], vec![0, 1]]);
        let mut layers = graph.layers();
        assert_eq!(layers, [[0], [1], [3]]);
        assert_eq!(graph.places(&mut layers), [(0, 0), (1, 0), (0, 0), (2, 0)]);
    }

    #[test]
    fn the_graph_has_all_nodes_and_edges() {
        let run = run(vec![
            job("a", &[], Status::Pass),
            job("b", &["a", "nobody"], Status::Pass),
            job("c", &["a", "b"], Status::Pass),
            job("alone", &[], Status::Pass),
        ]);
        let mut page = String::new();
        graph(&mut page, &run);
        assert_eq!((page.matches("<rect").count(), page.matches("<path").count()), (3, 3));
        assert!(page.contains("3 jobs from left to right, joined by 3 needs") && page.contains("any other: 1 job."));
    }

    #[test]
    fn a_circle_does_no_harm() {
        let run = run(vec![job("a", &["b"], Status::Pass), job("b", &["a"], Status::Pass)]);
        let mut page = String::new();
        graph(&mut page, &run);
        assert_eq!(page.matches("<rect").count(), 2);
    }

    #[test]
    fn every_node_has_a_place_of_its_own() {
        let names: Vec<String> = (0..MAX_NODES).map(|at| format!("job {at}")).collect();
        let jobs = names.iter().enumerate().map(|(at, name)| {
            let needs = [at / 2, at / 3, at / 7].map(|need| names[need].as_str());
            job(name, &needs, Status::Pass)
        });
        let graph = Graph::of(&run(jobs.collect()));
        let places = graph.places(&mut graph.layers());
        assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), MAX_NODES);
        for (at, need) in graph.needs.iter().enumerate().flat_map(|(at, needs)| needs.iter().map(move |n| (at, *n))) {
            assert!(places[need].0 < places[at].0, "{need} is not left of {at}");
        }
    }

    #[test]
    fn a_long_chain_is_layered_without_recursion() {
        let names: Vec<String> = (0..5000).map(|at| format!("job {at}")).collect();
        let jobs = (0..5000)
            .map(|at| job(&names[at], &[names[(at + 1) % 5000].as_str()][..usize::from(at < 4999)], Status::Pass));
        let layers = Graph::of(&run(jobs.collect())).layers();
        assert_eq!((layers.len(), layers[0][0], layers[4999][0]), (5000, 4999, 0));
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(["abc", "abcd", "äöü"].map(|text| cut(text, 3)), ["abc", "abc…", "ä…"]);
    }

    #[test]
    fn a_bar_for_each_attempt_and_a_lane_for_each_slot() {
        let mut run = run(vec![job("a", &[], Status::Pass), job("b", &[], Status::Fail)]);
        run.jobs[1].attempts[0].times.slot = u32::MAX;
        run.jobs[1].attempts[0].times.start_ms = u64::MAX;
        let mut page = String::new();
        timeline(&mut page, &run);
        assert_eq!(page.matches("<rect").count(), 2);
        assert_eq!(page.matches(">slot ").count(), 3);
        assert_eq!(page.matches("<title>").count(), 2);
    }
}
