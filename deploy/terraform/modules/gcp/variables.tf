variable "project" {
  description = "Id of the Google Cloud project, which exists and has billing."
  type        = string
}

variable "region" {
  description = "Region of everything, such as europe-west4."
  type        = string
}

variable "name" {
  description = "Begins the name of everything that is made, such as neuroloop."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,16}$", var.name))
    error_message = "Lower-case letters, digits and hyphens, 3 to 17 of them, beginning with a letter: a service account's name has 30 at most."
  }
}

variable "bucket" {
  description = "Name of the object store's bucket; unique in all of Google Cloud."
  type        = string
}

variable "api_from" {
  description = "Addresses from which the cluster's API can be reached: name -> CIDR."
  type        = map(string)
  default     = {}
}

variable "nodes" {
  description = "Ordinary nodes: type and how many of them in each zone."
  type        = object({ type = string, min = number, max = number })
  default     = { type = "e2-standard-4", min = 1, max = 4 }
}

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: machine, accelerator and at most how many; they come when a pod asks for one. 0: none."
  type        = object({ type = string, accelerator = string, max = number })
  default     = { type = "g2-standard-8", accelerator = "nvidia-l4", max = 0 }
}

variable "database" {
  description = "PostgreSQL: tier, gigabytes, and whether it has a standby in another zone."
  type        = object({ tier = string, gigabytes = number, standby = bool })
  default     = { tier = "db-custom-2-8192", gigabytes = 100, standby = true }
}

variable "protected" {
  description = "Whether cluster, database and bucket refuse to be destroyed."
  type        = bool
  default     = true
}

variable "backup_days" {
  description = "How many days a nightly backup is kept; erasures do not reach it."
  type        = number
  default     = 35
}
