def write_report(run):
    (run / "report.html").write_text("x")
    return run / "report.html"
