"""Start, serve and end a mount; the commands that control a running one."""
