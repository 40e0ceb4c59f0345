//! The page at `/`: one answer, made of the files of `page/`, which also work as they lie there.

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use std::sync::LazyLock;

/// It may run its own script and style and talk to this server, nothing else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("../../page/style.css");
const SCRIPTS: [(&str, &str); 3] = [
    ("ask.js", include_str!("../../page/ask.js")),
    ("draw.js", include_str!("../../page/draw.js")),
    ("input.js", include_str!("../../page/input.js")),
];

static PAGE: LazyLock<String> = LazyLock::new(|| {
    let page = include_str!("../../page/index.html");
    let page = page.replace("<link rel=\"stylesheet\" href=\"style.css\">", &format!("<style>\n{STYLE}</style>"));
    SCRIPTS.iter().fold(page, |page, (name, script)| {
        page.replace(&format!("<script src=\"{name}\"></script>"), &format!("<script>\n{script}</script>"))
    })
});

pub(super) async fn page() -> Response {
    let headers = [(header::CONTENT_SECURITY_POLICY, POLICY), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (headers, Html(PAGE.as_str())).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_asks_nobody_for_more() {
        assert!(!PAGE.contains(" src=") && !PAGE.contains("rel=\"stylesheet\""), "a file is not put in");
        let links = PAGE.matches("href=").count();
        assert_eq!(links, PAGE.matches("href=\"data:").count(), "only its icon, which is in it");
        assert!(
            !PAGE.contains("http://")
                || PAGE.matches("http://").count() == PAGE.matches("http://www.w3.org/2000/svg").count()
        );
        for part in [STYLE, SCRIPTS[0].1, SCRIPTS[1].1, SCRIPTS[2].1] {
            assert!(PAGE.contains(part));
            assert!(!part.contains("</script") && !part.contains("</style"));
        }
    }
}
