"""Methods of other papers, an option each."""
