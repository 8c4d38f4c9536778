//! Which jobs are run: names, filters, parts. Pure.
//!
//! A filter is made of `id(…)`, `tag(…)`, `needs(…)`, `rneeds(…)`, `failed()` and `all()` with `&`, `|`, `!` and
//! parentheses. What is in the parentheses is a glob such as `unit-*`, an exact text after `=`, or a regular expression
//! between slashes. `needs(x)` are the jobs that need `x`, directly or not, and `rneeds(x)` those that `x` needs; both with
//! `x` itself.

use std::{collections::HashSet, str::FromStr};

use regex::Regex;
use sha2::{Digest, Sha256};

use super::{graph, plan::Job};

/// The deepest that parentheses may be nested.
const DEPTH_MAX: usize = 64;

/// A filter.
#[derive(Debug, Clone)]
pub struct Filter(Node);

#[derive(Debug, Clone)]
enum Node {
    All,
    Id(Regex),
    Tag(Regex),
    Needs(Regex),
    NeededBy(Regex),
    Failed,
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
}

impl FromStr for Filter {
    type Err = String;

    /// # Errors
    /// What was expected, and where.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let node = parser.or()?;
        parser.space();
        match parser.rest().chars().next() {
            None => Ok(Self(node)),
            Some(_) => Err(parser.expected("`&`, `|` or the end")),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn take(&mut self, token: char) -> bool {
        self.space();
        let is_there = self.rest().starts_with(token);
        if is_there {
            self.at += token.len_utf8();
        }
        is_there
    }

    fn expected(&self, what: &str) -> String {
        let (column, rest) = (self.text[..self.at].chars().count() + 1, self.rest());
        let found = if rest.is_empty() { "the end".into() } else { format!("`{rest}`") };
        format!("the filter `{}`: expected {what} at column {column}, found {found}", self.text)
    }

    fn or(&mut self) -> Result<Node, String> {
        let mut node = self.and()?;
        while self.take('|') {
            node = Node::Or(Box::new(node), Box::new(self.and()?));
        }
        Ok(node)
    }

    fn and(&mut self) -> Result<Node, String> {
        let mut node = self.unary()?;
        while self.take('&') {
            node = Node::And(Box::new(node), Box::new(self.unary()?));
        }
        Ok(node)
    }

    fn unary(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("the filter is nested deeper than {DEPTH_MAX}"));
        }
        let node = if self.take('!') {
            Node::Not(Box::new(self.unary()?))
        } else if self.take('(') {
            let node = self.or()?;
            if !self.take(')') {
                return Err(self.expected("`)`"));
            }
            node
        } else {
            self.call()?
        };
        self.depth -= 1;
        Ok(node)
    }

    fn call(&mut self) -> Result<Node, String> {
        const CALLS: &str = "`id(…)`, `tag(…)`, `needs(…)`, `rneeds(…)`, `failed()`, `all()`, `!` or `(`";
        self.space();
        let start = self.at;
        let length = self.rest().find(|c: char| !c.is_ascii_lowercase()).unwrap_or(self.rest().len());
        let name = &self.rest()[..length];
        if !["id", "tag", "needs", "rneeds", "failed", "all", "cached"].contains(&name) {
            return Err(self.expected(CALLS));
        }
        self.at += length;
        if name == "cached" {
            return Err("`cached()`: the cache of results is not supported yet".into());
        }
        if !self.take('(') {
            self.at = start + length;
            return Err(self.expected("`(`"));
        }
        let node = match name {
            "failed" => Node::Failed,
            "all" => Node::All,
            _ => {
                let pattern = self.pattern()?;
                match name {
                    "id" => Node::Id(pattern),
                    "tag" => Node::Tag(pattern),
                    "needs" => Node::Needs(pattern),
                    _ => Node::NeededBy(pattern),
                }
            }
        };
        if self.take(')') { Ok(node) } else { Err(self.expected("`)`")) }
    }

    fn pattern(&mut self) -> Result<Regex, String> {
        self.space();
        if self.take('/') {
            let end = self.rest().find("/)").ok_or_else(|| self.expected("a regular expression that ends in `/)`"))?;
            let text = &self.rest()[..end];
            let regex = Regex::new(text).map_err(|error| {
                let error = error.to_string();
                format!("the regular expression `{text}`: {}", error.lines().last().unwrap_or_default().trim())
            })?;
            self.at += end + 1;
            return Ok(regex);
        }
        let exact = self.take('=');
        let end = self.rest().find(')').ok_or_else(|| self.expected("a name and `)`"))?;
        let text = self.rest()[..end].trim();
        if text.is_empty() {
            return Err(self.expected("a name"));
        }
        self.at += end;
        Ok(if exact { exactly(text) } else { glob(text) })
    }
}

fn exactly(text: &str) -> Regex {
    Regex::new(&format!("^(?:{})$", regex::escape(text))).expect("it is escaped")
}

/// `*` stands for anything, `?` for one character.
fn glob(text: &str) -> Regex {
    let pattern = regex::escape(text).replace(r"\*", ".*").replace(r"\?", ".");
    Regex::new(&format!("(?s)^(?:{pattern})$")).expect("it is escaped")
}

/// A part of the jobs, for several machines to have one each: `hash:2/4`, `count:1/3`, or `1/3`, which is by hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    by_count: bool,
    part: u64,
    of: u64,
}

impl FromStr for Partition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected a part such as `hash:1/3` or `count:2/3`, found `{text}`");
        let (by_count, parts) = match text.split_once(':') {
            Some(("hash", parts)) => (false, parts),
            Some(("count", parts)) => (true, parts),
            Some(_) => return Err(expected()),
            None => (false, text),
        };
        let (part, of) = parts.split_once('/').ok_or_else(expected)?;
        let (part, of) = (part.parse().map_err(|_| expected())?, of.parse().map_err(|_| expected())?);
        if of == 0 {
            return Err(expected());
        }
        if part == 0 || part > of {
            return Err(format!("expected a part from 1/{of} to {of}/{of}, found `{text}`"));
        }
        Ok(Self { by_count, part, of })
    }
}

impl Partition {
    /// Whether a job is of this part, of this name and the N-th of those that are shared out.
    fn has(self, name: &str, number: usize) -> bool {
        let value = if self.by_count {
            number as u64
        } else {
            let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
            digest.first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
        };
        value % self.of == self.part - 1
    }
}

/// Which jobs somebody wants.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Jobs by their ids, or by their names with their cells; none = all.
    pub names: Vec<String>,
    /// What they must be, too.
    pub filter: Option<Filter>,
    /// Which part of those.
    pub partition: Option<Partition>,
    /// Whether only those that were not well in the last run.
    pub rerun_failed: bool,
}

impl Selection {
    /// Which jobs are chosen, those included that they need; `failed` are the names of those that were not well in the
    /// last run.
    ///
    /// # Errors
    /// Names a job that there is not.
    pub(super) fn choose(&self, jobs: &[Job], failed: &HashSet<String>) -> Result<Vec<bool>, String> {
        for name in &self.names {
            if !jobs.iter().any(|job| job.id == *name || job.name == *name) {
                let known = jobs.iter().map(|job| job.id.as_str());
                return Err(format!("there is no job `{name}`{}", crate::settings::did_you_mean(name, known)));
            }
        }
        let needs: Vec<_> = jobs.iter().map(|job| job.needs.clone()).collect();
        let filtered = match &self.filter {
            Some(Filter(node)) => node.choose(jobs, &needs, failed),
            None => vec![true; jobs.len()],
        };
        let (mut chosen, mut count) = (vec![false; jobs.len()], 0);
        for (at, job) in jobs.iter().enumerate() {
            let is_named = self.names.is_empty() || self.names.iter().any(|name| job.id == *name || job.name == *name);
            let is_wanted = is_named && filtered[at] && (!self.rerun_failed || failed.contains(&job.name));
            if is_wanted {
                chosen[at] = self.partition.is_none_or(|partition| partition.has(&job.name, count));
                count += 1;
            }
        }
        Ok(graph::with_needs(&needs, &chosen))
    }
}

impl Node {
    fn choose(&self, jobs: &[Job], needs: &[Vec<usize>], failed: &HashSet<String>) -> Vec<bool> {
        let each = |is: &dyn Fn(&Job) -> bool| jobs.iter().map(is).collect::<Vec<_>>();
        let is_called = |pattern: &Regex, job: &Job| pattern.is_match(&job.id) || pattern.is_match(&job.name);
        match self {
            Self::All => vec![true; jobs.len()],
            Self::Id(pattern) => each(&|job| is_called(pattern, job)),
            Self::Tag(pattern) => each(&|job| job.tags.iter().any(|tag| pattern.is_match(tag))),
            Self::Needs(pattern) => graph::with_needs(&graph::dependents(needs), &each(&|job| is_called(pattern, job))),
            Self::NeededBy(pattern) => graph::with_needs(needs, &each(&|job| is_called(pattern, job))),
            Self::Failed => each(&|job| failed.contains(&job.name)),
            Self::Not(node) => node.choose(jobs, needs, failed).into_iter().map(|is| !is).collect(),
            Self::And(a, b) | Self::Or(a, b) => {
                let is_and = matches!(self, Self::And(..));
                let both = a.choose(jobs, needs, failed).into_iter().zip(b.choose(jobs, needs, failed));
                both.map(|(a, b)| if is_and { a && b } else { a || b }).collect()
            }
        }
    }
}
