//! Files of settings: TOML, and what is said of one that is not as expected: where, and what was meant.

use std::{fmt, str::FromStr, time::Duration};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue, ValueDeserializer},
};

use crate::limits::parse_duration;

/// The largest file of settings, in bytes.
pub(crate) const SETTINGS_MAX: u64 = 1 << 20;

/// What is wrong in a file of settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// What was expected, what came, and what was perhaps meant.
    pub message: String,
    /// The line, from 1; none when it is about the whole file.
    pub line: Option<usize>,
    /// The column of that, in characters from 1.
    pub column: usize,
    /// The line's text.
    pub text: String,
    /// How many characters of it are meant.
    pub width: usize,
}

impl Flaw {
    /// What is wrong with the whole file.
    pub(crate) fn of_all(message: impl Into<String>) -> Self {
        Self { message: message.into(), line: None, column: 0, text: String::new(), width: 0 }
    }

    /// What is wrong with the value of a key of a text that could be read.
    pub(crate) fn of_key(text: &str, key: &str, message: impl Into<String>) -> Self {
        let value = toml::de::DeTable::parse(text).ok().and_then(|table| Some(table.get_ref().get(key)?.span()));
        match value {
            Some(range) => Self::at(text, range, message.into()),
            None => Self::of_all(message),
        }
    }

    /// What is wrong with a range of a text.
    pub(crate) fn at(text: &str, range: std::ops::Range<usize>, message: String) -> Self {
        // the end of a text may lie behind it
        let start = floor(text, range.start.min(text.len()));
        let before = &text[..start];
        let begin = before.rfind('\n').map_or(0, |at| at + 1);
        let line_text = text[begin..].lines().next().unwrap_or_default();
        let end = floor(text, range.end.clamp(start, begin + line_text.len().max(start - begin)));
        Self {
            message,
            line: Some(before.matches('\n').count() + 1),
            column: text[begin..start].chars().count() + 1,
            text: line_text.into(),
            width: text[start..end].chars().count().max(1),
        }
    }
}

/// The start of the character that an index lies in.
fn floor(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl fmt::Display for Flaw {
    /// The place and the message on one line, and below that the line with a caret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(line) = self.line else { return f.write_str(&self.message) };
        writeln!(f, "line {line}, column {}: {}", self.column, self.message)?;
        // a tab stays one, so that the caret stands below what it points at
        let indent: String =
            self.text.chars().take(self.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let number = line.to_string();
        writeln!(f, "  {number} | {}", self.text)?;
        write!(f, "  {:width$} | {indent}{}", "", "^".repeat(self.width), width = number.len())
    }
}

/// Reads settings from a text.
///
/// # Errors
/// What is wrong, and where.
pub(crate) fn read<T: DeserializeOwned>(text: &str) -> Result<T, Flaw> {
    toml::from_str(text).map_err(|error| flaw_of(text, &error))
}

fn flaw_of(text: &str, error: &toml::de::Error) -> Flaw {
    let message = suggest(error.message());
    match error.span() {
        Some(range) => Flaw::at(text, range, message),
        None => Flaw::of_all(message),
    }
}

/// A table of a text, as far as it can be read, with all that is wrong with how it is written.
pub(crate) fn parse(text: &str) -> (Spanned<DeTable<'_>>, Vec<Flaw>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    (table, errors.iter().map(|error| flaw_of(text, error)).collect())
}

/// Reads a table of a text, one key that is not as expected after the other left out: none when something is still wrong
/// then. All that is wrong is added to `flaws`.
pub(crate) fn read_table<T: DeserializeOwned>(
    text: &str,
    table: Spanned<DeTable<'_>>,
    flaws: &mut Vec<Flaw>,
) -> Option<T> {
    let span = table.span();
    let mut table = table.into_inner();
    loop {
        let value = Spanned::new(span.clone(), DeValue::Table(table.clone()));
        let error = match T::deserialize(ValueDeserializer::from(value)) {
            Ok(read) => return Some(read),
            Err(error) => error,
        };
        flaws.push(flaw_of(text, &error));
        let at = error.span()?.start;
        let is_meant = |(key, value): &(Spanned<_>, Spanned<DeValue<'_>>)| {
            key.span().start <= at && at < value.span().end.max(key.span().end)
        };
        let before = table.len();
        table = table.into_iter().filter(|entry| !is_meant(entry)).collect();
        if table.len() == before {
            return None;
        }
    }
}

/// Adds to what is said of an unknown name which of the known ones was perhaps meant.
fn suggest(message: &str) -> String {
    let message = message.trim();
    for kind in ["unknown field `", "unknown variant `"] {
        let Some((name, rest)) = message.strip_prefix(kind).and_then(|rest| rest.split_once('`')) else { continue };
        return format!("{message}{}", did_you_mean(name, rest.split('`').skip(1).step_by(2)));
    }
    message.into()
}

/// Which of the known names was perhaps meant, as the end of a message; nothing when none is near.
pub(crate) fn did_you_mean<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|known| (strsim::damerau_levenshtein(name, known), known)).min();
    match near {
        Some((distance, near)) if distance <= near.len().max(name.len()).div_ceil(3) => {
            format!("; did you mean `{near}`?")
        }
        _ => String::new(),
    }
}

/// Reads what is written as a text: a size, a grant.
///
/// # Errors
/// What was expected.
pub(crate) fn parsed<'de, T: FromStr<Err: fmt::Display>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}

/// As [`parsed`], of what may be left out.
///
/// # Errors
/// What was expected.
pub(crate) fn parsed_some<'de, T: FromStr<Err: fmt::Display>, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    parsed(from).map(Some)
}

/// As [`parsed`], of several.
///
/// # Errors
/// What was expected.
pub(crate) fn parsed_all<'de, T: FromStr<Err: fmt::Display>, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    struct Parsed<T>(T);
    impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Parsed<T> {
        fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            parsed(from).map(Parsed)
        }
    }
    Ok(Vec::<Parsed<T>>::deserialize(from)?.into_iter().map(|Parsed(item)| item).collect())
}

/// Reads a time with its unit.
///
/// # Errors
/// What was expected.
pub(crate) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    parse_duration(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Bytes;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    #[expect(dead_code, reason = "only read")]
    struct Some {
        #[serde(default, deserialize_with = "parsed_some")]
        memory: Option<Bytes>,
        #[serde(default)]
        workers: Option<u32>,
    }

    fn flaw(text: &str) -> String {
        read::<Some>(text).expect_err("a flaw").to_string()
    }

    #[test]
    fn a_flaw_has_a_place_and_says_what_was_meant() {
        assert_eq!(
            flaw("memory = \"1MiB\"\nwrokers = 2\n"),
            "line 2, column 1: unknown field `wrokers`, expected `memory` or `workers`; did you mean `workers`?\n  \
             2 | wrokers = 2\n    | ^^^^^^^"
        );
        assert!(
            flaw("zzzzzzzzzzzz = 2")
                .ends_with("expected `memory` or `workers`\n  1 | zzzzzzzzzzzz = 2\n    | ^^^^^^^^^^^^")
        );
        let size = flaw("# ä\n\tmemory = \"big\"");
        assert!(size.starts_with("line 2, column 11: expected a size such as"), "{size}");
        assert!(size.ends_with("\n  2 | \tmemory = \"big\"\n    | \t         ^^^^^"), "{size}");
        assert!(flaw("workers = -1").starts_with("line 1, column 11: invalid value"));
        for text in ["memory = ", "a\n\n\nb", "workers = \"", "[", "\u{feff}=", "workers = 1\nworkers = 2", "ä = 'ö"]
        {
            let flaw = flaw(text);
            assert!(flaw.contains("line ") && flaw.contains('^'), "{text}: {flaw}");
        }
    }
}
