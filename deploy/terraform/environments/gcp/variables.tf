variable "project" {
  description = "Id of the Google Cloud project, which exists and has billing."
  type        = string
}

variable "region" {
  description = "Region of everything."
  type        = string
  default     = "europe-west4"
}

variable "api_from" {
  description = "Addresses from which the cluster's API can be reached: name -> CIDR; empty: from inside the network only."
  type        = map(string)
  default     = {}
}

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: machine, accelerator and at most how many."
  type        = object({ type = string, accelerator = string, max = number })
  default     = { type = "g2-standard-8", accelerator = "nvidia-l4", max = 0 }
}
