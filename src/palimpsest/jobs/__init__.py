"""What the command line does, as functions: a job joins the verbs, the report and the user's files."""
