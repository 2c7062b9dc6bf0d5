"""Virtual files: counters and controls of a running mount, in the mount and by the control socket."""
