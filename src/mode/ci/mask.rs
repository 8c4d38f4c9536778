//! Secrets, kept out of all that is told: their values, and those as base64, in a URL and in JSON are replaced.

use std::fmt::Write as _;

use aho_corasick::{AhoCorasick, MatchKind};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};

/// What stands where a secret was.
const MASK: &str = "***";

/// A shorter value is none: it would be found everywhere.
pub(super) const SECRET_MIN: usize = 4;

/// Finds secrets.
#[derive(Debug, Clone, Default)]
pub(super) struct Masks {
    /// None: there are no secrets.
    finder: Option<AhoCorasick>,
    longest: usize,
}

impl Masks {
    /// Of these values.
    pub(super) fn of<'a>(secrets: impl Iterator<Item = &'a str>) -> Self {
        // one of several lines is told line by line
        let parts = |secret: &'a str| std::iter::once(secret).chain(secret.lines());
        let parts = secrets.flat_map(parts).filter(|part| part.len() >= SECRET_MIN);
        let mut forms: Vec<String> = parts.flat_map(forms).collect();
        forms.sort_unstable();
        forms.dedup();
        let longest = forms.iter().map(String::len).max().unwrap_or(0);
        let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&forms);
        Self { finder: finder.ok().filter(|_| longest > 0), longest }
    }

    /// Whether there is nothing to be found.
    pub(super) fn is_empty(&self) -> bool {
        self.finder.is_none()
    }

    /// Whether some of it is a secret.
    pub(super) fn find(&self, bytes: &[u8]) -> bool {
        self.finder.as_ref().is_some_and(|finder| finder.is_match(bytes))
    }

    /// A text without them.
    pub(super) fn mask(&self, text: &str) -> String {
        match &self.finder {
            Some(finder) => {
                let mut masked = String::new();
                finder.replace_all_with(text, &mut masked, |_, _, masked| {
                    masked.push_str(MASK);
                    true
                });
                masked
            }
            None => text.into(),
        }
    }

    /// How many bytes have to be looked at together.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }
}

/// Takes bytes as they come, and gives them on without secrets, wherever they are cut.
#[derive(Debug)]
pub(super) struct Masker {
    masks: Masks,
    /// What could be the begin of a secret.
    kept: Vec<u8>,
}

impl Masker {
    pub(super) fn new(masks: Masks) -> Self {
        Self { masks, kept: vec![] }
    }

    /// Takes more, and appends what is certain to `out`.
    pub(super) fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let Some(finder) = &self.masks.finder else { return out.extend_from_slice(bytes) };
        self.kept.extend_from_slice(bytes);
        // a secret that begins before here is there as a whole
        let certain = self.kept.len().saturating_sub(self.masks.longest - 1);
        let mut done = 0;
        for found in finder.find_iter(&self.kept) {
            if found.start() >= certain {
                break;
            }
            out.extend_from_slice(&self.kept[done..found.start()]);
            out.extend_from_slice(MASK.as_bytes());
            done = found.end();
        }
        if done < certain {
            out.extend_from_slice(&self.kept[done..certain]);
            done = certain;
        }
        self.kept.drain(..done);
    }

    /// All the rest.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        let kept = std::mem::take(&mut self.kept);
        let Some(finder) = &self.masks.finder else { return };
        finder.replace_all_with_bytes(&kept, out, |_, _, out| {
            out.extend_from_slice(MASK.as_bytes());
            true
        });
    }
}

/// The forms in which a secret may be told.
fn forms(secret: &str) -> Vec<String> {
    let mut forms = vec![secret.to_owned()];
    // base64 of a text that it is part of: it begins at the first, the second or the third byte of a group, and what
    // belongs to its neighbours is left out
    for before in 0..3usize {
        let mut bytes = vec![0; before];
        bytes.extend_from_slice(secret.as_bytes());
        let encoded = STANDARD_NO_PAD.encode(&bytes);
        let start = [0, 2, 3][before];
        let end = bytes.len() * 8 / 6;
        if let Some(form) = encoded.get(start..end)
            && form.len() >= SECRET_MIN
        {
            forms.push(form.into());
            forms.push(form.replace('+', "-").replace('/', "_"));
        }
    }
    for is_upper in [true, false] {
        let mut url = String::new();
        for byte in secret.bytes() {
            let is_plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            let _ = match (is_plain, is_upper) {
                (true, _) => write!(url, "{}", byte as char),
                (false, true) => write!(url, "%{byte:02X}"),
                (false, false) => write!(url, "%{byte:02x}"),
            };
        }
        forms.push(url.replace("%20", "+"));
        forms.push(url);
    }
    let json = serde_json::to_string(secret).unwrap_or_default();
    forms.push(json.trim_matches('"').into());
    forms.retain(|form| form.len() >= SECRET_MIN);
    forms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(secrets: &[&str], text: &str, cut: usize) -> String {
        let mut masker = Masker::new(Masks::of(secrets.iter().copied()));
        let mut out = vec![];
        for part in text.as_bytes().chunks(cut) {
            masker.take(part, &mut out);
        }
        masker.finish(&mut out);
        String::from_utf8(out).expect("a text")
    }

    #[test]
    fn a_secret_is_masked_however_it_is_cut() {
        let text = "a hunter2-hunter2hunter b=hunter2";
        for cut in 1..text.len() {
            assert_eq!(masked(&["hunter2"], text, cut), "a ***-***hunter b=***", "{cut}");
            // the longest, where several are
            assert_eq!(masked(&["hunter2", "hunter2-h"], text, cut), "a ***unter2hunter b=***", "{cut}");
            assert_eq!(masked(&[], text, cut), text);
        }
    }

    #[test]
    fn lines_of_a_secret_are_secrets() {
        let secret = "-----BEGIN-----\nMIIEow==\nab\n-----END-----";
        assert_eq!(masked(&[secret], "a MIIEow== ab\n", 3), "a *** ab\n");
        assert_eq!(masked(&[secret], &format!("<{secret}>"), 5), "<***>");
    }

    #[test]
    fn its_other_forms_are_masked_and_what_is_none_is_not() {
        let secret = "p ä\"s/s?w";
        let masks = Masks::of([secret].into_iter());
        for before in ["", "x", "xy"] {
            let encoded = STANDARD_NO_PAD.encode(format!("{before}{secret} and more"));
            assert!(masks.mask(&encoded).contains(MASK), "{encoded}");
        }
        for form in ["p%20%C3%A4%22s%2Fs%3Fw", "p+%C3%A4%22s%2Fs%3Fw", "p%20%c3%a4%22s%2fs%3fw", "p ä\\\"s/s?w"] {
            assert_eq!(masks.mask(&format!("<{form}>")), "<***>");
        }
        // short ones are none, and one that is turned round is another text
        assert!(Masks::of(["abc"].into_iter()).is_empty());
        assert!(!masks.find("w?s/s\"ä p".as_bytes()));
    }
}
