//! What is live in a folder, as a page for people or JSON for tools.

use std::{
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

use hyper::{
    Method, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, HeaderValue},
};
use serde::{Deserialize, Serialize};

use super::{reply::Reply, ticket::Ticket};

/// What is in a folder.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// The apps, by name.
    pub(crate) apps: Vec<Entry>,
}

/// An app, as far as its visitors may know it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Its name.
    pub(crate) name: String,
    /// Where it is: a path, or a host.
    pub(crate) at: String,
    /// How it stands: `live`, `starting`, `asleep`, `failed`, `refused`, `disabled`.
    pub(crate) state: String,
    /// The version that is live: the start of a hash of the guest and its settings.
    pub(crate) version: Option<String>,
    /// How many workers it has.
    pub(crate) workers: u32,
    /// Since when this version is live, in milliseconds since 1970.
    pub(crate) since_ms: Option<u64>,
    /// What was wrong last, since this version went live.
    pub(crate) error: Option<String>,
}

/// Whether a request is for the list.
pub(super) fn is_asked<B>(request: &Request<B>) -> bool {
    request.uri().path() == "/" && [Method::GET, Method::HEAD].contains(request.method())
}

/// Answers with the list: a page if the client would rather have one.
pub(super) fn answer<B>(listing: &Listing, request: &Request<B>, ticket: Ticket) -> Response<Reply> {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if !prefers_html(accept) {
        return ticket.respond(StatusCode::OK, serde_json::to_vec(listing).expect("plain data has a JSON form"));
    }
    let mut response = ticket.respond(StatusCode::OK, page(listing));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    response
}

/// Whether a page comes before JSON in what a client accepts.
fn prefers_html(accept: &str) -> bool {
    let quality = |wanted: &str| {
        accept.split(',').find_map(|entry| {
            let mut parts = entry.split(';').map(str::trim);
            if parts.next() != Some(wanted) {
                return None;
            }
            let q = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
            Some(q.unwrap_or(1.0))
        })
    };
    quality("text/html").is_some_and(|html| html > 0.0 && html > quality("application/json").unwrap_or(0.0))
}

fn page(listing: &Listing) -> String {
    let mut page = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Apps</title>\
         <meta name=viewport content=\"width=device-width\"><style>body{font:16px system-ui;margin:2rem}\
         table{border-collapse:collapse}th,td{text-align:left;padding:.3rem 1rem .3rem 0;vertical-align:top}\
         td.error{color:#b00;white-space:pre-wrap}</style>\
         <h1>Apps</h1><table><tr><th>App<th>State<th>Version<th>Since<th>Workers<th>Error</tr>",
    );
    for Entry { name, at, state, version, workers, since_ms, error } in &listing.apps {
        let name = if at.starts_with('/') {
            format!("<a href=\"{}\">{}</a>", escaped(at), escaped(name))
        } else {
            format!("{} ({})", escaped(name), escaped(at))
        };
        let version = escaped(version.as_deref().unwrap_or_default());
        let since = since_ms.map_or_else(String::new, |since| {
            humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(since)).to_string()
        });
        let error = escaped(error.as_deref().unwrap_or_default());
        let _ = write!(
            page,
            "<tr><td>{name}<td>{}<td><code>{version}</code><td>{since}<td>{workers}<td class=error>{error}</tr>",
            escaped(state)
        );
    }
    page.push_str("</table>");
    page
}

fn escaped(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut safe, c| {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
        safe
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_for_those_who_would_rather_have_one() {
        for accept in ["text/html", "text/html,application/xhtml+xml,*/*;q=0.8", "application/json;q=0.5, text/html"] {
            assert!(prefers_html(accept), "{accept}");
        }
        for accept in ["", "*/*", "application/json", "text/html;q=0", "text/html;q=0.3, application/json"] {
            assert!(!prefers_html(accept), "{accept}");
        }
    }

    #[test]
    fn nothing_on_the_page_is_markup_of_somebody_else() {
        let entry = Entry {
            name: "<script>".into(),
            at: "/\"onclick=".into(),
            state: "live".into(),
            version: None,
            workers: 1,
            since_ms: Some(0),
            error: Some("a < b & 'c'".into()),
        };
        let page = page(&Listing { apps: vec![entry] });
        assert!(!page.contains("<script>") && !page.contains("/\"onclick"), "{page}");
        assert!(page.contains("1970-01-01T00:00:00Z"), "{page}");
        assert!(page.contains("a &lt; b &amp; &#39;c&#39;"), "{page}");
    }
}
